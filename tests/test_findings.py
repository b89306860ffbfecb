"""Faults that were found by trying the project with other people's files. Each test holds the right value, and failed before."""
import json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from codegpt_nbc.core.paths import BASE_MODEL
from codegpt_nbc.data.codexglue import imported
from codegpt_nbc.data.inputs import RunConfig
from codegpt_nbc.data.samples import load_samples
from codegpt_nbc.data.text_format import spell_out
from codegpt_nbc.data.tokenizer import encode_batch, load_tokenizer, train_tokenizer, save_tokenizer
from codegpt_nbc.engines.onnx_export import export_onnx
from codegpt_nbc.evidence.evaluate import size_of
from codegpt_nbc.evidence.held_out import held_out_rows
from codegpt_nbc.methods.quantize import quantize
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.families import is_regular
from codegpt_nbc.model.folder import load_model, read_config, save_model, shape_of_config
from codegpt_nbc.model.layers import Shape

TOY = Shape(vocab=300, context=64, d_model=16, d_head=8, heads=(2, 2), inner=(64, 64))
LLAMA = Shape(300, 64, 32, 8, (2,)*12, (48,)*12, 'llama', queries=2, tied=False)


def folder_of(shape, where, **config):
    "A model folder of random weights with a tokenizer of its own."
    words = where.with_name(where.name + '-words'); words.mkdir(exist_ok=True)
    save_tokenizer(train_tokenizer(['def f ( x ) : <EOL> return x'], [], shape.vocab), words)
    folder = save_model(Decoder(shape).init_weights(), where, parent=words)
    if config: (folder/'config.json').write_text(json.dumps(read_config(folder) | config))
    return folder


# 1. Writing never destroys

def test_an_export_over_its_source_is_refused(tmp_path):
    source = folder_of(TOY, tmp_path/'mine')
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    with pytest.raises((ValueError, FileExistsError), match='mine'): export_onnx(source, source, 'int8')
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_a_folder_with_anything_foreign_is_never_replaced(tmp_path):
    docs = tmp_path/'docs'; docs.mkdir(); (docs/'thesis.tex').write_text('years of work')
    with pytest.raises((ValueError, FileExistsError), match='docs'):
        save_model(Decoder(TOY).init_weights(), docs)
    assert (docs/'thesis.tex').read_text() == 'years of work'
    mixed = folder_of(TOY, tmp_path/'mixed'); (mixed/'notes.txt').write_text('mine')
    with pytest.raises((ValueError, FileExistsError), match='notes.txt'): save_model(Decoder(TOY).init_weights(), mixed)
    assert (mixed/'notes.txt').read_text() == 'mine'


def test_an_earlier_output_of_the_same_kind_is_replaced_whole(tmp_path):
    first = folder_of(TOY, tmp_path/'m')
    again = save_model(Decoder(replace(TOY, d_model=32)).init_weights(), first, parent=BASE_MODEL)
    assert load_model(again).shape.d_model == 32
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith('.tmp')) == []


# 2. Nothing from elsewhere is believed

@pytest.mark.parametrize('stored', ['truncation', 'padding'])
def test_stored_truncation_and_padding_are_ignored(tmp_path, stored):
    tok = load_tokenizer(BASE_MODEL)
    want = encode_batch(tok, ['import os <EOL> ' * 40, 'x'])
    tok.enable_truncation(16) if stored == 'truncation' else tok.enable_padding(length=99)
    tok.save(str(tmp_path/'tokenizer.json'))
    assert encode_batch(load_tokenizer(tmp_path), ['import os <EOL> ' * 40, 'x']) == want


def slow_files(folder):
    "Vocabulary and merges as CodeGPT's folders have them, `<EOL>` added."
    merged = ['Ġ', 'im', 'po', 'rt', 'impo', 'import', 'Ġo', 'Ġos', 'de', 'def', 'Ġde', 'Ġdef', 'Ġf']
    words = ['<s>', '</s>', '<pad>', *map(chr, range(33, 127)), *merged, '<EOL>']
    merges = ['i m', 'p o', 'r t', 'im po', 'impo rt', 'Ġ o', 'Ġo s', 'd e', 'de f', 'Ġ de', 'Ġde f', 'Ġ f']
    folder.mkdir(exist_ok=True)
    (folder/'vocab.json').write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder/'merges.txt').write_text('#version: 0.2\n' + '\n'.join(merges) + '\n')
    (folder/'added_tokens.json').write_text(json.dumps({'<EOL>': words.index('<EOL>')}))
    special = dict(bos_token='<s>', eos_token='</s>', unk_token='<|endoftext|>', pad_token='<pad>', additional_special_tokens=['<EOL>'])
    (folder/'special_tokens_map.json').write_text(json.dumps(special))
    (folder/'tokenizer_config.json').write_text('{}')
    return words


def test_codegpts_tokens_are_those_that_it_was_trained_with(tmp_path):
    # transformers' slow tokenizer strips blanks around added words; this is what it answers
    words = slow_files(tmp_path/'w')
    ids = encode_batch(load_tokenizer(tmp_path/'w'), ['import os <EOL> def f'])[0]
    assert [words[i] for i in ids] == ['import', 'Ġos', '<EOL>', 'def', 'Ġf']


STATED = {   # what a folder says of added words → is it in tokenizer_config.json, special_tokens_map.json and added_tokens.json?
    'as CodeGPT': ({}, None, None),
    'nothing': (None, {}, {}),
    'objects': ({'bos_token': {'__type': 'AddedToken', 'content': '<s>', 'lstrip': False, 'rstrip': False, 'normalized': True},
                 'add_bos_token': True, 'unk_token': None}, {'pad_token': {'content': '<p>', 'lstrip': True, 'rstrip': False,
                 'normalized': False, 'single_word': False}}, {}),
    'by ids': ({'added_tokens_decoder': {'200': {'content': '<b>', 'special': False}, '7': {'content': '<a>', 'special': True}},
                'mask_token': '<m>', 'eos_token': '</s>', 'add_eos_token': True, 'add_bos_token': True},
               {'cls_token': '<no>'}, {'<no>': 3}),
    'both lists': ({'additional_special_tokens': ['<x>', '<y>'], 'add_prefix_space': True, 'image_token': '<i>'},
                   {'additional_special_tokens': ['<z>'], 'audio_token': '<u>', 'sep_token': '<x>'}, {'<k>': 300, '<j>': 299}),
    'a dictionary': ({'extra_special_tokens': {'one_token': '<1>', 'two_token': '<2>'}}, {'eos_token': ''}, {'<s>': 0}),
}


@pytest.mark.parametrize('name', STATED)
def test_vocabulary_and_merges_are_converted_as_transformers_converts_them(name, tmp_path, monkeypatch):
    transformers = pytest.importorskip('transformers')
    slow_files(tmp_path)
    for file, stated in zip(('tokenizer_config', 'special_tokens_map', 'added_tokens'), STATED[name]):
        if stated is not None: (tmp_path/f'{file}.json').write_text(json.dumps(stated))
        elif name == 'nothing': (tmp_path/f'{file}.json').unlink()
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path).backend_tokenizer
    added = theirs.get_added_tokens_decoder().values()
    theirs.add_special_tokens([AddedToken(t.content, lstrip=True, rstrip=True, normalized=False, special=True) for t in added])
    monkeypatch.setitem(sys.modules, 'transformers', None)   # as if it were not installed
    ours = load_tokenizer(tmp_path)
    assert json.loads(ours.to_str()) == json.loads(theirs.to_str())
    for text in ('import os <EOL> def f', '<s> x = 1 </s>', '<a> <b><1> <k>', ' import  os\n\tdef', 'é 漢', '',
                 '<|endoftext|>', '<x><y> <i>'):
        ids = theirs.encode(text).ids
        assert ours.encode(text).ids == ids and ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize('file, text', [('vocab.json', '{"a": '), ('merges.txt', 'a'), ('merges.txt', None),
                                        ('tokenizer_config.json', '[]'), ('added_tokens.json', '3'),
                                        ('special_tokens_map.json', '{"bos_token": {}}')])
def test_a_damaged_vocabulary_is_a_sentence(file, text, tmp_path):
    slow_files(tmp_path)
    (tmp_path/file).unlink()
    if text: (tmp_path/file).write_text(text)
    with pytest.raises(ValueError, match='is damaged .*: restore vocab.json and merges.txt'): load_tokenizer(tmp_path)


def test_what_is_made_from_vocabulary_and_merges_can_be_opened_again(tmp_path):
    words = slow_files(tmp_path/'w')
    model = Decoder(replace(TOY, vocab=len(words) + 10)).init_weights()
    made = save_model(quantize(model), tmp_path/'q', parent=tmp_path/'w')
    assert (made/'tokenizer.json').is_file()
    text = ['import os <EOL> def f']
    assert encode_batch(load_tokenizer(made), text) == encode_batch(load_tokenizer(tmp_path/'w'), text)


def test_special_ids_and_settings_are_carried_on(tmp_path):
    source = folder_of(TOY, tmp_path/'s', bos_token_id=7, eos_token_id=[8, 9], pad_token_id=10)
    (source/'generation_config.json').write_text('{"temperature": 0.2}')
    (source/'chat_template.jinja').write_text('{{ messages }}')
    made = save_model(load_model(source), tmp_path/'m', parent=source)
    config = read_config(made)
    assert (config['bos_token_id'], config['eos_token_id'], config['pad_token_id']) == (7, [8, 9], 10)
    assert json.loads((made/'generation_config.json').read_text()) == {'temperature': .2} and (made/'chat_template.jinja').is_file()


def test_missing_special_ids_are_the_sources_not_invented(tmp_path):
    source = folder_of(TOY, tmp_path/'s')
    config = {k: v for k, v in read_config(source).items() if not k.endswith('token_id')}
    (source/'config.json').write_text(json.dumps(config))
    made = read_config(save_model(load_model(source), tmp_path/'m', parent=source))
    from transformers import GPT2Config
    theirs = GPT2Config()
    for key in ('eos_token_id', 'bos_token_id'): assert made.get(key, getattr(theirs, key)) == getattr(theirs, key)


def test_bfloat16_stays_bfloat16(tmp_path):
    source = folder_of(LLAMA, tmp_path/'s', torch_dtype='bfloat16', dtype='bfloat16')
    halves = {k: t.bfloat16() for k, t in load_file(source/'model.safetensors').items()}
    save_file(halves, source/'model.safetensors', metadata={'format': 'pt'})
    made = save_model(load_model(source), tmp_path/'m', parent=source)
    assert {t.dtype for t in load_file(made/'model.safetensors').values()} == {torch.bfloat16}


def test_tensors_without_a_place_are_named(tmp_path):
    source = folder_of(LLAMA, tmp_path/'s')
    biases = {f'model.layers.{l}.self_attn.q_proj.bias': torch.ones(32) for l in range(12)}
    save_file(load_file(source/'model.safetensors') | biases, source/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match='q_proj.bias'): load_model(source)


def test_defaults_are_transformers_own():
    from transformers import LlamaConfig
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48).to_dict()
    config.pop('rms_norm_eps')
    assert shape_of_config(config)[0].eps == 1e-6


@pytest.mark.parametrize('rope', [{'rope_type': 'default'}, {'type': 'default'}, None])
def test_settings_that_mean_what_we_do_are_accepted(tmp_path, rope):
    config = read_config(folder_of(LLAMA, tmp_path/'s')) | {'rope_scaling': rope}
    assert shape_of_config(config)[0] == LLAMA


def test_gelu_pytorch_tanh_is_gelu_new(tmp_path):
    assert shape_of_config(read_config(folder_of(TOY, tmp_path/'s')) | {'activation_function': 'gelu_pytorch_tanh'})[0] == TOY


@pytest.mark.parametrize('key', ['vocab_size', 'n_embd', 'n_layer', 'n_head', 'n_positions'])
def test_a_missing_key_of_the_configuration_is_a_sentence(tmp_path, key):
    config = read_config(folder_of(TOY, tmp_path/'s'))
    config.pop(key)
    with pytest.raises(ValueError, match=key): shape_of_config(config)


def test_pickled_weights_beside_safetensors_do_not_count(tmp_path):
    source = folder_of(TOY, tmp_path/'s')
    before = size_of(source).raw_bytes
    torch.save({'w': torch.zeros(99_999)}, source/'pytorch_model.bin')
    assert size_of(source).raw_bytes == before


def test_pickled_weights_alone_are_read_as_weights_only_with_a_warning(tmp_path):
    source = folder_of(TOY, tmp_path/'s')
    want, tensors = load_model(source), load_file(source/'model.safetensors')
    torch.save(tensors, source/'pytorch_model.bin'); (source/'model.safetensors').unlink()
    with pytest.warns(UserWarning, match='safetensors'): got = load_model(source)
    ids = torch.arange(20)[None]
    with torch.no_grad(): assert torch.equal(got(ids), want(ids))


class Evil:
    def __reduce__(self): return (print, ('executed',))


def test_a_pickle_that_is_more_than_weights_is_refused(tmp_path, capsys):
    source = folder_of(TOY, tmp_path/'s'); (source/'model.safetensors').unlink()
    torch.save({'x': Evil()}, source/'pytorch_model.bin')
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='pytorch_model.bin'): load_model(source)
    assert 'executed' not in capsys.readouterr().out


def test_a_pruned_llama_that_transformers_refuses_is_not_regular():
    assert not is_regular(Shape(300, 64, 40, 8, (3, 3), (48, 48), 'llama', queries=2))   # 6 query heads do not divide 40 channels


@pytest.mark.parametrize('where', ['model.layers.0.mlp.up_proj.weight', 'model.norm.weight'])
def test_values_that_are_not_finite_are_found_where_weights_are_read(tmp_path, where):
    source = folder_of(LLAMA, tmp_path/'s')
    tensors = load_file(source/'model.safetensors')
    tensors[where].view(-1)[3] = float('nan')
    save_file(tensors, source/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match=where): load_model(source)


# 3. Text as it comes

@pytest.mark.parametrize('separator', ['\x0c', '\x0b', '\u2028', '\u2029', '\x85', '\x1c'])
def test_only_newlines_end_a_line(separator):
    blank = separator if separator in '\x0c' else ''
    source = f"import os\n{blank}\nx = '{separator}'\na = 1\nb = f'{{a}}'\n"
    assert spell_out(source).endswith("a = <NUM_LIT:1> <EOL> b = f'<STR_LIT:{a}>'")


@pytest.mark.usefixtures('home')
def test_a_sample_keeps_its_answer_where_a_line_is_blank(tmp_path):
    d = tmp_path/'py150'; (d/'line_completion').mkdir(parents=True); (d/'token_completion').mkdir()
    files = [f'<s> import m{i} <EOL> x = f ( y{i} ) <EOL> return x . z </s>' for i in range(30)]
    (d/'token_completion'/'train.txt').write_text('\ufeff' + '\n'.join(files) + '\n', encoding='utf-8')
    (d/'token_completion'/'test.txt').write_text('\n'.join([*files[:3], '', *files[3:]]) + '\n')
    rows = [{'id': i + (i > 2), 'input': f'<s> import m{i} <EOL> x = f', 'gt': ''} for i in range(30)]
    (d/'line_completion'/'test.json').write_text('\n'.join(json.dumps(r) for r in rows))
    made = imported(d)
    got = pd.read_parquet(made/'test_codexglue.parquet')
    assert len(got) == 30 and set(got['gt']) == {f'( y{i} )' for i in range(30)}
    assert not pd.read_parquet(made/'train.parquet').text.str.startswith('\ufeff').any()


@pytest.mark.usefixtures('home')
def test_two_languages_in_one_folder_are_refused_or_kept_apart(tmp_path):
    for name in ('py150', 'javaCorpus'):
        d = tmp_path/name; (d/'token_completion').mkdir(parents=True); (d/'line_completion').mkdir()
        files = [f'<s> import {name}{i} <EOL> x = f ( y{i} ) <EOL> return x . z </s>' for i in range(30)]
        for s in ('train', 'dev', 'test'): (d/'token_completion'/f'{s}.txt').write_text('\n'.join(files) + '\n')
        samples = [{'id': i, 'input': f'<s> import {name}{i} <EOL> x', 'gt': ''} for i in range(30)]
        (d/'line_completion'/'test.json').write_text('\n'.join(map(json.dumps, samples)))
    with pytest.raises(ValueError, match='py150'): imported(tmp_path)


@pytest.mark.usefixtures('home')
def test_the_hubs_converted_layout_is_found(tmp_path):
    for split, n in (('train', 40), ('validation', 10), ('test', 20)):
        d = tmp_path/'python'/split; d.mkdir(parents=True)
        code = [f'<s> import m{i} <EOL> x = f ( y{i} ) <EOL> return x . z </s>' for i in range(n)]
        pd.DataFrame({'id': range(n), 'code': code}).to_parquet(d/'0000.parquet')
    made = imported(tmp_path)
    assert len(pd.read_parquet(made/'train.parquet')) == 40 and len(pd.read_parquet(made/'test_codexglue.parquet')) == 20


@pytest.mark.usefixtures('home')
def test_published_samples_can_be_read_token_by_token(tmp_path):
    d = tmp_path/'py150'; (d/'line_completion').mkdir(parents=True); (d/'token_completion').mkdir()
    files = ['<s> ' + ' <EOL> '.join(f'x{i} = f ( y{j} )' for j in range(120)) + ' </s>' for i in range(30)]
    (d/'token_completion'/'train.txt').write_text('\n'.join(files) + '\n')
    (d/'token_completion'/'test.txt').write_text('\n'.join(files) + '\n')
    rows = [{'id': i, 'input': files[i].rpartition(' <EOL> ')[0] + ' <EOL>', 'gt': ''} for i in range(30)]
    (d/'line_completion'/'test.json').write_text('\n'.join(json.dumps(r) for r in rows))
    c = RunConfig(run_id='x', data=str(d), codexglue=5, thesis=5, held_out=2000)
    c.check()
    there = load_samples('codexglue', folder=c.data_folder)
    assert list(there.columns) == ['project', 'path', 'input', 'gt'] and there.project.is_unique and len(there) == 30
    assert held_out_rows(c, BASE_MODEL, 64).shape == (31, 65)
    with pytest.raises(ValueError, match='1000000 held-out tokens asked, but the test files give .*: ask for fewer'):
        RunConfig(run_id='x', data=str(d), codexglue=5, thesis=5, held_out=10**6).check()


POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n'

@pytest.mark.usefixtures('home')
def test_a_table_that_was_not_fetched_is_named(tmp_path):
    code = [f'<s> import m{i} <EOL> x = f ( y{i} ) <EOL> return x . z </s>' for i in range(40)]
    for split in ('train', 'test'): pd.DataFrame({'id': range(40), 'code': code}).to_parquet(tmp_path/f'{split}.parquet')
    (tmp_path/'notes.parquet').write_text(POINTER)                   # of another kind
    assert len(pd.read_parquet(imported(tmp_path)/'train.parquet')) > 30
    (tmp_path/'test.parquet').write_text(POINTER)
    with pytest.raises(ValueError, match='test.parquet is damaged .*: fetch it again, from git by git lfs pull'): imported(tmp_path)


# 4. Limits

@pytest.mark.parametrize('level, error', [(1, 1e-3), (4, .2)])   # 4 rounds the inputs too
def test_int4_onnx_of_a_llama_of_twelve_layers_opens_and_agrees(tmp_path, level, error):
    from codegpt_nbc.engines.generate import open_engine
    from codegpt_nbc.methods.schemes import weight_schemes
    source = folder_of(LLAMA, tmp_path/'s')
    four = save_model(quantize(load_model(source), *weight_schemes()), tmp_path/'four', parent=source)
    engine, _ = open_engine(export_onnx(four, tmp_path/'o', 'int4', level), threads=1)
    reference, _ = open_engine(four, threads=1)
    ids = np.arange(24, dtype=np.int64)[None] % 300
    for e in (engine, reference): e.start(1, 40)
    a, b = (e.prefill(ids, np.array([24])) for e in (engine, reference))
    assert np.abs(a - b).max() < error*np.abs(b).max() + 1e-4


def test_sched_getaffinity_is_optional(monkeypatch):
    import os
    from codegpt_nbc.core.paths import cores
    monkeypatch.delattr(os, 'sched_getaffinity', raising=False); monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    assert cores() >= 1
    source = (Path(__file__).resolve().parent.parent/'codegpt_nbc'/'runs'/'grid.py').read_text(encoding='utf-8')
    assert 'sched_getaffinity' not in source


def test_text_is_read_and_written_as_utf8():
    root = Path(__file__).resolve().parent.parent/'codegpt_nbc'
    import re
    call = re.compile(r'\.(read_text|write_text)\(((?:[^()]|\([^()]*\))*)\)')
    for p in root.rglob('*.py'):
        if p.name == '_modidx.py': continue
        assert [m[0] for m in call.finditer(p.read_text(encoding='utf-8')) if 'encoding' not in m[2]] == [], p.name
