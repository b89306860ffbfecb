"""A GGUF file says the same as the folder it was written from: to transformers, which reads it, and to llama.cpp, which runs it."""
import re
from dataclasses import replace
from importlib.util import find_spec
import numpy as np, pytest, torch
from tokenizers import pre_tokenizers, processors
from codegpt_nbc.core.paths import BASE_MODEL, read_json, write_json
from codegpt_nbc.data.raw_text import begin_tokens
from codegpt_nbc.data.samples import load_samples
from codegpt_nbc.data.tokenizer import encode_batch, load_tokenizer, save_tokenizer, train_tokenizer
from codegpt_nbc.engines.generate import greedy
from codegpt_nbc.engines.gguf_export import ARCHITECTURES, export_gguf
from codegpt_nbc.engines.pytorch import TorchEngine
from codegpt_nbc.methods.quantize import quantize
from codegpt_nbc.methods.schemes import weight_schemes
from codegpt_nbc.model.convert_format import read_gguf
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.families import FAMILIES
from codegpt_nbc.model.folder import load_model, save_model
from codegpt_nbc.model.layers import Shape

gguf = pytest.importorskip('gguf', reason='no package gguf: pip install -r requirements-interop.txt')
NO_LLAMA = pytest.mark.skipif(not find_spec('llama_cpp'), reason='no llama-cpp-python: pip install -r requirements-interop.txt')
WRITTEN = [f for f in FAMILIES if f in ARCHITECTURES]
READ = [f for f in ('llama', 'mistral', 'qwen2', 'qwen3', 'gpt2') if f in FAMILIES]   # by transformers' reader


def random_folder(path, family: str, queries: int = 1, context: int = 1024):
    "A small regular model whose every part matters, with a small tokenizer."
    tok = train_tokenizer(['def f ( x ) : <EOL> return x'], [], 300)
    path.mkdir()
    save_tokenizer(tok, path)
    theta = Shape.theta if FAMILIES[family].learned else 5e4   # as eps, exact in float32, as the file has it
    shape = Shape(tok.get_vocab_size(), context, 32*queries, 16, (2, 2), (64, 64), family, queries=queries,
                  tied=FAMILIES[family].tied, eps=2**-20, theta=theta)
    model = Decoder(shape).init_weights().eval()
    for p in model.parameters(): p.data *= 1 + 7*(p.ndim == 2)
    return save_model(model, path.with_name(path.name + '-model'), parent=path)


@pytest.mark.parametrize('queries', [1, 2])
@pytest.mark.parametrize('family', READ)
def test_transformers_reads_what_is_written(tmp_path, family, queries):
    if queries > 1 and FAMILIES[family].learned: pytest.skip('GPT-2 has as many heads of keys as of queries')
    folder = random_folder(tmp_path/'m', family, queries, context=128)
    model, tok = load_model(folder), load_tokenizer(folder)
    again, words = read_gguf(export_gguf(folder, tmp_path/'m.gguf'))
    assert replace(again.shape, family=family) == model.shape   # a Mistral is a Llama in GGUF
    ids = torch.randint(model.shape.vocab, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): torch.testing.assert_close(again(ids), model(ids))
    text = 'def g ( y ) : return f ( y )'
    assert encode_batch(words, [text]) == encode_batch(tok, [text])


def beginning_with(folder, ids: list, **settings):
    "The folder with a tokenizer whose post-processor puts these tokens before a text, and with these settings."
    tok = load_tokenizer(folder)
    first = {tok.id_to_token(i): i for i in ids}
    tok.post_processor = processors.TemplateProcessing(single=' '.join([*first, '$A']), special_tokens=[*first.items()])
    tok.save(str(folder/'tokenizer.json'))
    write_json(folder/'tokenizer_config.json', settings)
    return folder


@pytest.mark.parametrize('settings', [{}, {'add_bos_token': False}, {'add_bos_token': True}])
@pytest.mark.parametrize('ids', [[], [2]])
def test_a_file_begins_a_text_as_the_folder_does(tmp_path, ids, settings):
    folder = beginning_with(random_folder(tmp_path/'m', 'llama'), ids, **settings)
    write_json(folder/'config.json', read_json(folder/'config.json') | {'bos_token_id': 1})
    assert begin_tokens(load_tokenizer(folder)) == ids
    fields = gguf.GGUFReader(export_gguf(folder, tmp_path/'m.gguf')).fields
    assert fields['tokenizer.ggml.add_bos_token'].contents() == bool(ids)
    assert fields['tokenizer.ggml.bos_token_id'].contents() == (ids or [1])[0]


def test_a_text_that_begins_with_several_tokens_is_refused(tmp_path):
    folder = beginning_with(random_folder(tmp_path/'m', 'llama'), [1, 2])
    with pytest.raises(ValueError, match='begins a text with 2 tokens'): export_gguf(folder, tmp_path/'m.gguf')


def test_what_gguf_cannot_say_is_refused_before_a_file_is_written(tmp_path):
    sliced = Decoder(Shape(load_tokenizer().get_vocab_size(), 64, 32, 16, (1, 2), (32, 32))).init_weights()
    folder = save_model(sliced, tmp_path/'sliced')
    with pytest.raises(ValueError, match='layers of this model differ'): export_gguf(folder, tmp_path/'m.gguf')
    (tmp_path/'notes').write_text('mine')
    with pytest.raises(FileExistsError, match='is no GGUF file'): export_gguf(BASE_MODEL, tmp_path/'notes')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['notes', 'sliced']


@pytest.fixture
def llama(monkeypatch):
    "A function that opens a file in llama.cpp. Keys and values are in single precision, as here."
    from llama_cpp import GGML_TYPE_F32, Llama, llama_cpp
    defaults = llama_cpp.llama_model_default_params

    def plain_buffers():   # its buffers for AMX end the process at the first product with integer weights (0.3.36)
        params = defaults()
        params.use_extra_bufts = False
        return params
    monkeypatch.setattr(llama_cpp, 'llama_model_default_params', plain_buffers)
    how = dict(n_ctx=0, n_threads=1, n_threads_batch=1, verbose=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)
    return lambda path, logits_all=False: Llama(str(path), logits_all=logits_all, **how)


def by_llama(model, ids: list, new: int, stop: int) -> list:
    "`new` ids at most, greedily."
    model.reset()
    out = []
    for token in model.generate(ids, temp=0., reset=True):
        if token == stop or len(out) == new: return out
        out.append(token)


@NO_LLAMA
@pytest.mark.parametrize('precision', ['fp32', 'fp16', 'int8', 'int4'])
def test_llama_cpp_writes_our_text(tmp_path, llama, precision):
    """Of the embedded model, on held-out prompts; in int8 and int4 the codes are the same, and llama.cpp rounds the inputs of products
    too. int4 is of a folder that has four bits with zero points."""
    tok, prompts = load_tokenizer(), load_samples('codexglue', 12, 'test').input
    rows = [row[-400:] for row in encode_batch(tok, list(prompts))]
    dense = load_model()
    model = quantize(dense, *weight_schemes(8)[:-1]) if precision == 'int8' else dense
    if precision == 'int4': model = quantize(dense, *weight_schemes(4, symmetric=False))
    folder = save_model(model, tmp_path/'four', parent=BASE_MODEL) if precision == 'int4' else BASE_MODEL
    want, stop = greedy(TorchEngine(model), rows, 32, tok.token_to_id('<EOL>')), tok.token_to_id('<EOL>')
    theirs = llama(export_gguf(folder, tmp_path/'m.gguf', precision))
    same = [by_llama(theirs, row, 32, stop) == ours for row, ours in zip(rows, want)]
    assert sum(same) >= {'fp32': 12, 'fp16': 12, 'int8': 10, 'int4': 8}[precision], same


@NO_LLAMA
def test_llama_cpp_reads_our_tokens(tmp_path, llama):
    "The same ids, once the blanks in front of a word of the format are gone, which its tokenizer does not take off."
    theirs, tok = llama(export_gguf(BASE_MODEL, tmp_path/'m.gguf')), load_tokenizer()
    text = "<s> def read ( path ) : <EOL> with open ( path , '<STR_LIT:rb>' ) as f : <EOL> return f . read ( <NUM_LIT:0> )"
    words = sorted((t.content for t in tok.get_added_tokens_decoder().values() if t.lstrip), key=len, reverse=True)
    bare = re.sub(rf'\s+({"|".join(map(re.escape, words))})', r'\1', text)
    assert theirs.tokenize(bare.encode(), add_bos=False, special=True) == encode_batch(tok, [text])[0]


@NO_LLAMA
@pytest.mark.parametrize('family', WRITTEN)
def test_llama_cpp_computes_every_family(tmp_path, llama, family):
    "Logits of a small random model, within what its half-precision tables of activations lose."
    folder = random_folder(tmp_path/'m', family, 2 if 'shared' in FAMILIES[family].keys else 1, context=64)
    model, theirs = load_model(folder), llama(export_gguf(folder, tmp_path/'m.gguf'), logits_all=True)
    ids = torch.randint(3, model.shape.vocab, (1, 20), generator=torch.Generator().manual_seed(0))
    theirs.eval(ids[0].tolist())
    with torch.no_grad(): want = model(ids)[0, -1]
    found = torch.tensor(np.array(theirs.scores[19]))
    assert float((found - want).abs().max()/want.std()) < .02


def test_text_is_split_as_the_file_says(tmp_path):
    folder = random_folder(tmp_path/'m', 'llama')
    tok = load_tokenizer(folder)
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    save_tokenizer(tok, folder)
    _, again = read_gguf(export_gguf(folder, tmp_path/'m.gguf'))
    text = ['x = [\n    1234,\n    56]']
    assert encode_batch(again, text) == encode_batch(tok, text)
    assert again.pre_tokenizer.pre_tokenize_str('\n    1')[0][0] == 'ĊĠĠĠĠ'   # GPT-2's leaves one blank to what follows


def written(path, state, **more):
    "A GGUF file like that of a small Llama which states more, and has more tensors, as `state` and `more` say."
    source = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix('.new.gguf'), 'llama')
    for name, field in source.fields.items():
        if name.startswith('GGUF.') or name == 'general.architecture' or name in state: continue
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None)
    for name, value in state.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.FLOAT32)
    for t in source.tensors: writer.add_tensor(t.name, t.data, raw_shape=t.data.shape, raw_dtype=t.tensor_type)
    for name, data in more.items(): writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix('.new.gguf')


@pytest.mark.parametrize('state', [{'llama.rope.scaling.type': 'linear', 'llama.rope.scaling.factor': 4.}, {'llama.rope.scale_linear': 4.}])
def test_linear_scaling_of_positions_is_read(tmp_path, state):
    path = export_gguf(random_folder(tmp_path/'m', 'llama'), tmp_path/'m.gguf')
    assert read_gguf(path)[0].shape.scaling is None
    scaling = read_gguf(written(path, state))[0].shape.scaling
    assert (scaling.kind, scaling.factor) == ('linear', 4.)


@pytest.mark.parametrize('state, more, said', [
    ({'llama.rope.scaling.type': 'yarn', 'llama.rope.scaling.factor': 4.}, {}, 'scaled as yarn'),
    ({}, {'rope_freqs.weight': np.ones(8, np.float32)}, r'scaled by a table \(Llama 3.1\)'),
    ({'tokenizer.ggml.pre': 'deepseek-coder'}, {}, "^text of this file is split as 'deepseek-coder' before BPE"),
    ({'llama.rope.scaling.type': 'linear'}, {}, 'states no llama.rope.scaling.factor'),
])
def test_what_is_not_known_of_a_file_is_refused(tmp_path, state, more, said):
    path = export_gguf(random_folder(tmp_path/'m', 'llama'), tmp_path/'m.gguf')
    with pytest.raises(ValueError, match=said): read_gguf(written(path, state, **more))


def test_a_file_that_does_not_fit_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    from codegpt_nbc.core import paths
    path = export_gguf(random_folder(tmp_path/'m', 'llama'), tmp_path/'m.gguf')
    monkeypatch.setattr(paths, 'free_memory', lambda: 1000)
    with pytest.raises(paths.MemoryShort, match='reading .*m.gguf takes'): read_gguf(path)
