"""Limits of models and inputs: each is lifted, or said in one sentence, alike in every method."""
import json, os, subprocess, sys, warnings
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file
from codegpt_nbc.data.tokenizer import save_tokenizer, train_tokenizer
from codegpt_nbc.engines.generate import open_engine
from codegpt_nbc.engines.gguf_export import export_gguf
from codegpt_nbc.engines.onnx_export import build_graph, export_onnx
from codegpt_nbc.engines.onnx_run import OrtEngine, operator_times
from codegpt_nbc.engines.pytorch import TorchEngine
from codegpt_nbc.engines.session import Session
from codegpt_nbc.methods.distill import DistillConfig, StudentShape, distill, distill_step, layers_of, number_of
from codegpt_nbc.methods.gptq import gptq
from codegpt_nbc.methods.mixed import MixedConfig, train_mixed
from codegpt_nbc.methods.prune import PruneConfig, prune, prune_step
from codegpt_nbc.methods.quantize import finetune_quantized, quantize
from codegpt_nbc.methods.schemes import Scheme, weight_schemes
from codegpt_nbc.methods.static_quantize import StaticConfig, calibrate, mixed_precision, static_quantize
from codegpt_nbc.methods.xtc import XtcConfig, load_models, xtc, xtc_step
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.folder import load_model, read_config, recipe_of, save_model
from codegpt_nbc.model.layers import KVCache, Shape
from codegpt_nbc.model.train import Samples, TrainConfig
from codegpt_nbc.runs.grid import read_recipes
from codegpt_nbc.runs.steps import make_step, method_of, step_config

TOY = Shape(vocab=300, context=32, d_model=16, d_head=8, heads=(2, 2), inner=(32, 32))
LLAMA = replace(TOY, family='llama', queries=2, tied=False, heads=(1, 1))
LINE = '<s> ' + ' <EOL> '.join(f'def f{i} ( x ) : <EOL> return x + y{i} * z' for i in range(12)) + ' </s>'   # of more than 100 tokens


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp('words')
    save_tokenizer(train_tokenizer([LINE], [], 300), folder)
    return folder


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    "Sixty files of more than 100 tokens, in the frozen corpus's layout."
    d = tmp_path_factory.mktemp('corpus')
    texts = [LINE.replace('x', f'x{i}') for i in range(60)]
    pd.DataFrame({'project': [f'p{i}' for i in range(60)], 'path': 'a.py', 'text': texts}).to_parquet(d/'train.parquet')
    samples = pd.DataFrame({'project': [f'q{i}' for i in range(40)], 'path': 'a.py'}).assign(input=LINE.removesuffix(' </s>'), gt='x')
    for name in ('test_codexglue', 'valid_codexglue', 'test_thesis'): samples.to_parquet(d/f'{name}.parquet')
    return d


def saved(shape, folder, words): return save_model(Decoder(shape).init_weights(), folder, parent=words)


# Rows longer than the context

METHODS = {
    'prune': dict(samples=4, epochs=2, sparsity=.2, length=100),
    'quantize': dict(finetune_samples=4, length=100),
    'static_quantize': dict(calibration_batches=2, batch=2, length=100),
    'gptq': dict(calibration=4, length=100),
    'distill': dict(tokens=600, length=100, student='reduced', layers=.5, choice='spread', teacher='self', batch=4),
    'xtc': dict(tokens=600, length=100, bits=1, batch=4),
}


@pytest.mark.usefixtures('home')
@pytest.mark.parametrize('shape', [TOY, LLAMA], ids=['gpt2', 'llama'])
@pytest.mark.parametrize('method', METHODS)
def test_rows_longer_than_the_context_are_cut_with_one_warning(method, shape, words, corpus, tmp_path):
    source, (config, step) = saved(shape, tmp_path/'m', words), method_of(method)
    own = {k: str(source) if v == 'self' else v for k, v in METHODS[method].items()}
    c = config(run_id=method, profile='limits', model=str(source), data=str(corpus), codexglue=0, thesis=0, **own)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        made = step(c, tmp_path/'out').folder
    said = [str(w.message) for w in seen if 'longer rows are cut' in str(w.message)]
    assert said == ['length is 100, but the model has 32 positions: longer rows are cut.']
    ids = torch.arange(32)[None]
    with torch.no_grad(): assert load_model(made)(ids).isfinite().all()


@pytest.mark.usefixtures('home')
@pytest.mark.parametrize('method', METHODS)
def test_a_recipe_fits_its_steps_to_the_model(method, words, corpus, tmp_path):
    source = saved(TOY, tmp_path/'m', words)
    own = {k: str(source) if v == 'self' else v for k, v in METHODS[method].items()}
    c = step_config({'method': method}, source, own, str(corpus))
    assert (make_step(c, method).folder/'config.json').is_file()


@pytest.mark.parametrize('shape', [TOY, LLAMA], ids=['gpt2', 'llama'])
def test_rows_that_are_given_directly_are_cut_or_refused_in_a_sentence(shape):
    model, rows = Decoder(shape).init_weights(), torch.randint(0, 300, (4, 100))
    with pytest.warns(UserWarning, match='longer rows are cut'): gptq(model, rows, *weight_schemes())
    with pytest.warns(UserWarning, match='longer rows are cut') as seen: calibrate(model, iter([rows, rows]))
    assert len(seen) == 1
    with pytest.raises(ValueError, match='a row has 100 tokens, but the model has 32 positions'): model(rows)
    samples = Samples(rows.tolist(), 2, 100)
    with pytest.raises(ValueError, match='a row has 99 tokens'): finetune_quantized(model, Scheme(), samples, TrainConfig(steps=1))


# Values that are not finite

WHERE = ['blocks.0.mlp.up.bias', 'blocks.1.norm1.weight', 'blocks.1.attn.proj.weight', 'tokens.weight', 'norm.bias']


@pytest.mark.parametrize('where', WHERE)
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_nothing_is_made_of_values_that_are_not_finite(where, value, words, tmp_path):
    model = Decoder(TOY).init_weights()
    model.state_dict()[where].view(-1)[3] = value
    with pytest.raises(ValueError, match=where): quantize(model)
    with pytest.raises(ValueError, match=where): quantize(model, *weight_schemes())
    with pytest.raises(ValueError, match=where): build_graph(model)
    source = save_model(model, tmp_path/'m', parent=words)
    for precision in ('fp32', 'int8', 'int4'):
        with pytest.raises(ValueError, match='not finite'): export_onnx(source, tmp_path/'o', precision)
    assert not (tmp_path/'o').exists()


def quantised_folders(words, folder):
    "int8, blocks of four bits, static."
    model, ids = Decoder(TOY).init_weights(), [torch.arange(32)[None]]
    static = static_quantize(quantize(model), calibrate(model, ids), *mixed_precision())
    made = {'int8': quantize(model), 'int4': quantize(model, *weight_schemes()), 'static': static}
    return {name: save_model(m, folder/name, parent=words) for name, m in made.items()}


@pytest.mark.parametrize('kind', ['int8', 'int4', 'static'])
def test_readers_of_quantised_folders_name_what_is_not_finite(kind, words, tmp_path):
    folder = quantised_folders(words, tmp_path)[kind]
    whole, config = load_file(folder/'model.safetensors'), read_config(folder)
    config['quantization_config'].pop('weights_sha256')   # as in a folder from elsewhere
    (folder/'config.json').write_text(json.dumps(config))
    for name, t in whole.items():
        if not t.is_floating_point(): continue
        broken = t.clone()
        broken.view(-1)[-1] = float('nan')
        save_file({**whole, name: broken}, folder/'model.safetensors', metadata={'format': 'pt'})
        with pytest.raises(ValueError, match=f"'{name}' holds values that are not finite"): load_model(folder)
        for precision in ('fp32', 'int8', 'int4'):
            with pytest.raises(ValueError): export_onnx(folder, tmp_path/'o', precision)
    assert not (tmp_path/'o').exists()


# Caches grow with the text

@pytest.mark.parametrize('family', ['gpt2', 'llama'])
@pytest.mark.parametrize('runtime', ['torch', 'onnx'])
def test_a_session_takes_memory_for_its_text_not_for_the_context(family, runtime, words, tmp_path):
    shape = replace(TOY if family == 'gpt2' else LLAMA, context=4096)
    source = saved(shape, tmp_path/'m', words)
    engine, tok = open_engine(source if runtime == 'torch' else export_onnx(source, tmp_path/'o', 'fp32'), threads=1)
    s = Session(engine, tok, max_new=8, until_eol=False)
    text = LINE[:100]
    while len(s.encode(text)) < 40: text += ' x'
    s.complete(text)
    needs = len(s.cached) + 1
    assert 40 <= needs <= 60
    for longer in (1, 3, 10, 30):   # and growing changes nothing
        own, other = s.complete(text*longer), Session(engine, tok, max_new=8, until_eol=False)
        other.engine.start(1, 4096)
        assert own == other.complete(text*longer) and s.written.tokens == other.written.tokens
        needs = len(s.cached) + 1
        arrays = s.engine.cache.k + s.engine.cache.v if runtime == 'torch' else list(s.engine.cache.values())
        assert {a.shape[2] for a in arrays} == {s.engine.cache.capacity if runtime == 'torch' else s.engine.capacity}
        assert max(a.shape[2] for a in arrays) < 2*needs


@pytest.mark.parametrize('shape', [TOY, LLAMA], ids=['gpt2', 'llama'])
def test_logits_are_those_of_a_cache_of_the_whole_context(shape):
    grown, whole = (TorchEngine(Decoder(replace(shape, context=512)).init_weights()) for _ in range(2))
    grown.start(1, 1)
    whole.start(1, 512)
    ids, at = np.random.default_rng(0).integers(0, 300, 500), 0
    for n in (1, 30, 1, 1, 90, 7, 300, 70):
        assert np.array_equal(grown.extend(ids[at:at+n], min(n, 3)), whole.extend(ids[at:at+n], min(n, 3)))
        at += n
    assert grown.cache.capacity <= 512


def test_a_batch_of_rows_grows_too():
    cache = KVCache(TOY, 3, 4)
    cache.k[0][:] = 1.
    cache.reserve(5)
    assert cache.capacity == 7 and cache.k[0].shape == (3, 2, 7, 8) and cache.k[0][:, :, :4].all() and not cache.k[0][:, :, 4:].any()
    cache.reserve(30)
    assert cache.capacity == 32 == cache.v[1].shape[2]   # no more than the model has


@pytest.mark.parametrize('shape', [TOY, LLAMA], ids=['gpt2', 'llama'])
@pytest.mark.parametrize('runtime', ['torch', 'fp32', 'int8', 'int4'])
def test_no_row_goes_on_beyond_the_context(runtime, shape, words, tmp_path):
    source = saved(shape, tmp_path/'m', words)
    engine = TorchEngine(source) if runtime == 'torch' else OrtEngine(export_onnx(source, tmp_path/'o', runtime), 1)
    ids = np.arange(300)
    engine.start(1, 8)
    engine.prefill(ids[None, :30], np.array([30]))
    for n in (31, 32): assert np.isfinite(engine.step(ids[n:n+1])).all()
    with pytest.raises(ValueError, match='a row has 33 tokens, but the model has 32 positions'): engine.step(ids[:1])
    engine.rewind(20)
    with pytest.raises(ValueError, match='a row has 320 tokens'): engine.extend(ids)
    assert np.isfinite(engine.extend(ids[:12])).all()   # a refusal harms nothing
    engine.start(1, 8)
    with pytest.raises(ValueError, match='a row has 33 tokens'): engine.prefill(ids[None, :33], np.array([33]))


@pytest.mark.parametrize('precision', ['fp32', 'int8'])
def test_more_rows_than_were_begun_are_refused(precision, words, tmp_path):
    engine = OrtEngine(export_onnx(saved(LLAMA, tmp_path/'m', words), tmp_path/'o', precision), 1)
    engine.start(2, 20)
    with pytest.raises(RuntimeError): engine.prefill(np.ones((3, 20), np.int64), np.full(3, 20))


GOES_ON = """
import re, sys, numpy as np, torch
from codegpt_nbc.engines.pytorch import TorchEngine
from codegpt_nbc.model import decoder
from codegpt_nbc.model.layers import Shape
torch.set_num_threads(1)
decoder.PIECE = int(sys.argv[1])
engine = TorchEngine(decoder.Decoder(Shape(300, 8192, 112, 8, (2,), (112,), family='llama', queries=7)).init_weights())
ids = np.random.default_rng(0).integers(0, 300, 6000)
engine.start(1, 6000)
engine.prefill(ids[None, :2000], np.array([2000]))
def memory(of): return int(re.search(of + r':\\s+(\\d+)', open('/proc/self/status').read())[1])/1e3   # MB
before = memory('VmHWM')
logits = engine.extend(ids[2000:], 3)
print(memory('VmHWM') - before, *logits.ravel())
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads the memory of a process from /proc')
def test_tokens_that_go_on_take_the_memory_of_a_piece():
    "4,000 after 2,000, 7 queries a key: 800 MB in one piece, whose mask has a number for each pair."
    def run(piece):
        env = {**os.environ, 'OMP_NUM_THREADS': '1'}
        done = subprocess.run([sys.executable, '-c', GOES_ON, str(piece)], capture_output=True, text=True, env=env)
        assert not done.returncode, done.stderr[-2000:]
        megabytes, *logits = map(float, done.stdout.split())
        return megabytes, logits
    (own, logits), (whole, same) = run(512), run(6000)
    assert own < 200 < 600 < whole
    np.testing.assert_allclose(logits, same, atol=1e-5)


@pytest.mark.parametrize('precision', ['fp32', 'int4'])
def test_the_times_of_operators_are_of_whole_prompts(precision, words, tmp_path):
    source = saved(replace(LLAMA, context=2048), tmp_path/'m', words)
    folder = export_onnx(source, tmp_path/'o', precision)
    def once(tokens): return sum(read for read, _ in operator_times(folder, tokens, 3, 1).values())   # ms
    def took(tokens): return min(once(tokens) for _ in range(3))     # beside other programs
    assert took(1034) > 2*took(300)   # in int4 the graph for tokens reads the last 10


# Shares of layers

@pytest.mark.parametrize('layers, of, want', [
    (.5, 12, 6), (.5, 8, 4), (.5, 4, 2), (.5, 1, 1), (.25, 12, 3), (1., 5, 5), (.01, 12, 1), (6, 12, 6), (1, 12, 1)])
def test_a_share_of_layers_is_of_the_model_at_hand(layers, of, want):
    assert number_of(layers, of) == want
    model = Decoder(replace(TOY, heads=(2,)*of, inner=(32,)*of)).init_weights()
    c = DistillConfig(run_id='x', student='random', layers=layers)
    assert len(layers_of(model, c, [[1]*20])) == want


@pytest.mark.usefixtures('home')
@pytest.mark.parametrize('n', [4, 8])
def test_the_recipe_half_halves_any_model(n, words, corpus, tmp_path):
    source = saved(replace(TOY, heads=(2,)*n, inner=(32,)*n), tmp_path/'m', words)
    recipes = read_recipes()
    shares = {s['layers'] for r in recipes.values() for s in r.steps if 'layers' in s}
    assert shares == {.5}
    c = step_config(recipes['half'].steps[0], source, dict(tokens=300, length=32, batch=4), str(corpus))
    made = make_step(c, 'distill').folder
    assert load_model(made).shape.n_layer == n//2
    assert recipe_of(made)[-1]['layers'] == n//2


@pytest.mark.parametrize('n, want', [(4, [0, 3]), (8, [0, 2, 5, 7])])
def test_xtc_takes_a_share_a_number_or_indices(n, want, words, tmp_path):
    source = saved(replace(TOY, heads=(2,)*n, inner=(32,)*n), tmp_path/'m', words)
    start = load_model(source)
    for layers in (.5, n//2, want):
        student, _ = load_models(XtcConfig(run_id='x', model=str(source), layers=layers, length=32))
        for own, theirs in enumerate(want): assert torch.equal(student.blocks[own].mlp.up.weight, start.blocks[theirs].mlp.up.weight)


@pytest.mark.parametrize('layers', [0, -1, 0., 1.5, 'six', [[1]], []])
def test_other_layers_are_refused_in_a_sentence(layers):
    for config in (DistillConfig, XtcConfig):
        with pytest.raises(ValueError, match='layers') as e: config(run_id='x', layers=layers)
        assert '\n' not in str(e.value)


# Trainings beside a teacher

def packed(folder, ids):
    "A corpus of these token ids."
    folder.mkdir(exist_ok=True)
    np.asarray(ids, np.uint16).tofile(folder/'train.bin')
    return str(folder)


@pytest.mark.usefixtures('home')
def test_a_training_goes_on_only_with_the_text_that_it_began_with(words, corpus, tmp_path, monkeypatch):
    source, ids = saved(TOY, tmp_path/'m', words), np.arange(500) % 300
    def work(kind, **own): return kind(run_id='x', model=str(source), **own).work.name
    for kind, own in ((DistillConfig, {}), (XtcConfig, {}), (MixedConfig, {'bits': {'blocks.0.mlp.up': '8'}})):
        folder = packed(tmp_path/'packed', ids)
        first = work(kind, corpus=folder, **own)
        assert work(kind, corpus=folder, **own) == first
        assert work(kind, corpus=packed(tmp_path/'packed', ids[::-1]), **own) != first
        before = work(kind, data=str(corpus), **own)
        shard = pd.read_parquet(corpus/'train.parquet')
        shard.iloc[::-1].to_parquet(corpus/'train.parquet')
        after = work(kind, data=str(corpus), **own)
        shard.to_parquet(corpus/'train.parquet')
        assert before != after
        monkeypatch.setattr('codegpt_nbc.methods.distill.code_of', lambda *places: 'changed')
        assert work(kind, corpus=packed(tmp_path/'packed', ids), **own) != first
        monkeypatch.undo()
        monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path))


@pytest.mark.usefixtures('home')
def test_a_packed_corpus_is_read_more_than_once(words, corpus, tmp_path):
    (tmp_path/'packed').mkdir()
    for file in words.iterdir(): (tmp_path/'packed'/file.name).write_bytes(file.read_bytes())
    common = dict(model=str(saved(TOY, tmp_path/'m', words)), data=str(corpus), corpus=packed(tmp_path/'packed', np.arange(2000) % 300),
                  length=32, layers=[0], lr=1e-3, validation=4)
    losses = [distill_step(DistillConfig(run_id=f'x{epochs}', epochs=epochs, tokens=512*epochs, **common)).details for epochs in (1, 2)]
    assert losses[1]['steps'] == 2*losses[0]['steps'] and losses[1]['loss_after']['student'] < losses[0]['loss_after']['student']


@pytest.mark.usefixtures('home')
def test_layers_of_a_bfloat16_model_are_written_as_they_were_trained(words, corpus, tmp_path):
    source = save_model(Decoder(TOY).init_weights(), tmp_path/'m', parent=words, dtype=torch.bfloat16)
    c = XtcConfig(run_id='x', model=str(source), data=str(corpus), bits=32, layers=1, tokens=256, length=32, validation=4)
    folder = xtc_step(c).folder
    assert load_file(folder/'model.safetensors')['transformer.wte.weight'].dtype == torch.bfloat16 and load_model(folder).shape.n_layer == 1


@pytest.mark.parametrize('method', ['mixed', 'xtc', 'ternary', 'distill'])
def test_zeros_of_a_pruned_model_stay(method, home):
    student, teacher = Decoder(TOY).init_weights(), Decoder(TOY).init_weights(1)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if 'blocks' in name and p.ndim == 2: p[:, ::2] = 0
    zeros = {name: p == 0 for name, p in student.named_parameters() if 'blocks' in name and p.ndim == 2}
    rows = [[(7*i + j) % 300 for j in range(33)] for i in range(32)]
    common = dict(run_id='x', tokens=1024, length=32, lr=1e-2)
    if method == 'xtc': xtc(student, teacher, rows, XtcConfig(bits=32, layers=1, **common))   # the layers of `student` are chosen
    elif method == 'ternary': xtc(student, teacher, rows, XtcConfig(bits=2, **common))
    elif method == 'distill': distill(student, teacher, rows, DistillConfig(student='model', **common))
    else: train_mixed(student, teacher, rows, MixedConfig(bits=dict.fromkeys((n.removesuffix('.weight') for n in zeros), '8'), **common))
    trained = dict(student.named_parameters())
    for name, zero in zeros.items(): assert zero.any() and not trained[name][zero].any() and trained[name][~zero].any()


@pytest.mark.parametrize('pattern', ['structured', 'lasso'])
def test_structures_are_cut_out_of_a_masked_model_without_filling_it(pattern):
    rows = [[(7*i + j) % 300 for j in range(33)] for i in range(32)]
    masked, _ = prune(Decoder(TOY).init_weights(), rows, PruneConfig(run_id='x', pattern='unstructured', sparsity=.4, length=32, batch=8))
    cut, report = prune(masked, rows, PruneConfig(run_id='x', pattern=pattern, sparsity=.2, length=32, batch=8))
    assert cut.shape != TOY and report.nonzero < .8*report.params


def test_codes_of_one_bit_have_no_zero_to_hold(home):
    student, teacher = Decoder(TOY).init_weights(), Decoder(TOY).init_weights(1)
    with torch.no_grad(): student.blocks[0].mlp.up.weight[:, ::2] = 0
    rows = [[(7*i + j) % 300 for j in range(33)] for i in range(32)]
    c = MixedConfig(run_id='x', bits={'blocks.0.mlp.up': '1'}, tokens=1024, length=32, lr=1e-2)
    train_mixed(student, teacher, rows, c)
    trained = student.blocks[0].mlp.up.weight[:, ::2]
    assert (trained < 0).any() and (trained > 0).any()      # and so can become −1 as well as 1


def test_zeros_of_rounding_are_not_held(words, corpus, home, tmp_path):
    dense = saved(TOY, tmp_path/'dense', words)
    common = dict(run_id='x', data=str(corpus), tokens=2000, length=32, lr=1e-2, validation=4)
    ternary = xtc_step(XtcConfig(model=str(dense), bits=2, **common), tmp_path/'ternary').folder
    small = load_model(xtc_step(XtcConfig(model=str(ternary), bits=32, layers=[0], **common), tmp_path/'small').folder)
    assert small.blocks[0].mlp.up.weight.all()


@pytest.mark.parametrize('pattern', ['unstructured', 'structured', 'lasso'])
def test_a_sparsity_out_of_reach_is_refused_before_the_training(pattern, monkeypatch):
    monkeypatch.setattr('codegpt_nbc.methods.prune.fit', lambda *_, **__: pytest.fail('it trained'))
    with pytest.raises(ValueError, match='sparsity 0.999 is out of reach'):
        prune(Decoder(TOY).init_weights(), [[1]*9]*4, PruneConfig(run_id='x', pattern=pattern, sparsity=.999, length=8))


@pytest.mark.parametrize('config, said', [
    (lambda: PruneConfig(run_id='x', pattern='lasso', epochs=1), 'the pattern lasso needs steps under its penalty'),
    (lambda: PruneConfig(run_id='x', pattern='tile', lam=3.), 'the pattern tile does not read lam'),
    (lambda: PruneConfig(run_id='x', pattern='unstructured', importance='norm'), 'the pattern unstructured does not read importance'),
    (lambda: PruneConfig(run_id='x', pattern='structured', alpha=.1), 'the pattern structured does not read alpha'),
    (lambda: PruneConfig(run_id='x', backend='itrex', pattern='tile', penalty_steps=4).check(), 'knows no penalty_steps or recovery_steps'),
    (lambda: DistillConfig(run_id='x', corpus='wide', shortest=.5), 'a packed corpus has rows and no files'),
    (lambda: StaticConfig(run_id='x', grouped=[], groups=2), 'grouped names no place')])
def test_a_parameter_without_effect_is_refused(config, said):
    with pytest.raises(ValueError, match=said): config()


@pytest.mark.parametrize('pattern, read, not_read', [('unstructured', {'alpha'}, {'importance', 'lam'}),
                                                     ('structured', {'importance', 'lam'}, {'alpha'})])
def test_a_recipe_names_what_pruning_read(pattern, read, not_read, words, corpus, home, tmp_path):
    model = saved(TOY, tmp_path/'m', words)
    c = PruneConfig(run_id='x', model=str(model), data=str(corpus), pattern=pattern, sparsity=.2, samples=4, length=32)
    step = recipe_of(prune_step(c, tmp_path/'small').folder)[-1]
    assert read <= step.keys() and not not_read & step.keys()


@pytest.mark.parametrize('family, turned, want', [('llama', None, None), ('gpt_neox', 2, 2), ('gpt_neox', 4, 2), ('gpt_neox', 6, None)])
def test_a_student_of_another_shape_turns_its_channels_in_pairs(family, turned, want):
    start = Decoder(replace(TOY, family=family, turned=turned)).init_weights()
    with pytest.raises(ValueError, match='d_head is 7, but rotary positions turn channels in pairs'):
        StudentShape(layers=1, d_model=16, heads=2, d_head=7, inner=32).of(start.shape)
    shape = StudentShape(layers=1, d_model=16, heads=2, d_head=4, inner=32).of(start.shape)
    assert shape.turned == want
    assert Decoder(shape).init_weights()(torch.arange(8)[None]).isfinite().all()


# What is not written says so

def test_an_export_of_static_ranges_says_what_is_not_run_in_them(words, tmp_path):
    folders = quantised_folders(words, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        made = export_onnx(folders['static'], tmp_path/'o', 'int8')
        assert 'ranges' not in recipe_of(export_onnx(folders['int8'], tmp_path/'p', 'int8'))[-1]
    said = {'ranges': 'static', 'not_rounded': ['*.attn.scores', '*.attn.probabilities'], 'float_products': ['*.mlp.up']}
    assert recipe_of(made)[-1] == {'method': 'onnx', 'precision': 'int8', **said}
    with pytest.warns(UserWarning, match='calibrated ranges') as seen: made = export_onnx(folders['static'], tmp_path/'q', 'fp32')
    assert len(seen) == 1 and recipe_of(made)[-1] == {'method': 'onnx', 'precision': 'fp32', 'ranges': 'none'}


def test_an_export_to_gguf_says_that_calibrated_ranges_are_left_out(words, tmp_path):
    pytest.importorskip('gguf')
    static = quantised_folders(words, tmp_path)['static']
    with pytest.warns(UserWarning, match='an export to GGUF leaves the calibrated ranges'): export_gguf(static, tmp_path/'q.gguf')
