"""Mutated configurations, tokenizers, weights, code and profiles: one sentence or a right answer, never a traceback of another kind.

`CODEGPT_NBC_FUZZ=10000` tries so many inputs of each kind; by default few, with fixed seeds. Failures that were found stand as examples."""
import json, os, struct
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from codegpt_nbc.core.paths import read_json
from codegpt_nbc.data.codexglue import line_completion_samples
from codegpt_nbc.data.text_format import Literals, abstract, spell_out
from codegpt_nbc.data.tokenizer import encode_batch, load_tokenizer, save_tokenizer, train_tokenizer
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.folder import load_model, read_config, save_model, shape_of_config
from codegpt_nbc.model.layers import Shape
from codegpt_nbc.methods.quantize import quantize
from codegpt_nbc.runs.grid import Profile, expand

N = int(os.environ.get('CODEGPT_NBC_FUZZ', 60))
FUZZ = settings(max_examples=N, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
SENTENCE = (ValueError, OSError, RuntimeError, ImportError)   # what the command line shows as one sentence

WORDS = st.sampled_from(['gpt2', 'llama', 'float16', 'codegpt_nbc'])
SCALARS = st.none() | st.booleans() | st.integers(-2**40, 2**40) | st.floats() | st.text(max_size=8) | WORDS
JUNK = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3), max_leaves=5)
EXTRA = st.sampled_from(['slices', 'rope_scaling', 'rope_parameters', 'quantization_config', 'dtype', 'x'])
BLOCKS = st.dictionaries(st.sampled_from(['method', 'recipe', 'id', 'sweep', 'set', 'of', 'budgets']), JUNK, max_size=4)


def one_sentence(call, *allowed):
    "Call; an error must be one line of a kind that the command line shows."
    try: return call()
    except SENTENCE as e: assert '\n' not in str(e).strip() and str(e).strip(), f'{type(e).__name__}: {e}'
    return None


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Small folders of both families, one of them quantised."
    d = tmp_path_factory.mktemp('models')
    words = d/'words'; words.mkdir()
    save_tokenizer(train_tokenizer(['def f ( x ) : <EOL> return x'], [], 300), words)
    gpt2 = save_model(Decoder(Shape(300, 32, 16, 8, (2, 2), (24, 24))).init_weights(), d/'gpt2', parent=words)
    shape = Shape(300, 32, 16, 8, (1, 1), (24, 24), 'llama', queries=2, tied=False)
    llama = save_model(Decoder(shape).init_weights(), d/'llama', parent=words)
    return [gpt2, llama, save_model(quantize(load_model(gpt2)), d/'int8', parent=gpt2)]


@FUZZ
@given(which=st.integers(0, 2), changes=st.dictionaries(st.integers(0, 40), st.just('drop') | JUNK, min_size=1, max_size=3),
       extra=st.dictionaries(EXTRA, JUNK, max_size=1))
def test_configurations(folders, which, changes, extra):
    config = read_config(folders[which])
    keys = list(config)
    for i, value in changes.items():
        key = keys[i % len(keys)]
        if value == 'drop': config.pop(key, None)
        else: config[key] = value
    one_sentence(lambda: shape_of_config(config | extra))


@FUZZ
@given(which=st.integers(0, 2), at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 10**6))
def test_weights(folders, which, at, byte, cut, tmp_path_factory):
    source = folders[which]
    data = bytearray((source/'model.safetensors').read_bytes())
    header = 8 + struct.unpack('<Q', data[:8])[0]
    data[at % header] = byte
    if cut is not None: data = data[:cut % len(data)]
    d = tmp_path_factory.mktemp('w')
    for p in source.iterdir():
        if p.suffix == '.json': (d/p.name).write_bytes(p.read_bytes())
    (d/'model.safetensors').write_bytes(bytes(data))
    model = one_sentence(lambda: load_model(d))
    if model is not None:   # a change that nobody need notice, such as a byte of the metadata: then it computes what it did
        ids = torch.arange(8)[None]
        with torch.no_grad(): assert torch.equal(model(ids), load_model(source)(ids))


@FUZZ
@given(path=st.lists(st.integers(0, 30), min_size=1, max_size=3), value=JUNK, cut=st.none() | st.integers(0, 10**5))
def test_tokenizers(folders, path, value, cut, tmp_path_factory):
    d = tmp_path_factory.mktemp('t')
    t = json.loads((folders[0]/'tokenizer.json').read_text(encoding='utf-8'))
    node = t
    for i in path[:-1]:
        inner = [v for v in (node.values() if isinstance(node, dict) else node) if isinstance(v, (dict, list)) and v]
        if inner: node = inner[i % len(inner)]
    if isinstance(node, dict): node[list(node)[path[-1] % len(node)]] = value
    else: node[path[-1] % len(node)] = value
    text = json.dumps(t)
    (d/'tokenizer.json').write_text(text if cut is None else text[:cut % len(text)], encoding='utf-8')
    tok = one_sentence(lambda: load_tokenizer(d))
    if tok is not None: one_sentence(lambda: encode_batch(tok, ['def f ( x ) : <EOL> return x']))


@FUZZ
@given(lines=st.lists(st.text(max_size=30) | JUNK.map(json.dumps) | st.just('{"input": "<s> a", "gt": "b"}'), max_size=5))
def test_json_lines(lines, tmp_path_factory):
    p = tmp_path_factory.mktemp('j')/'test.json'
    p.write_text('\n'.join(lines), encoding='utf-8', errors='replace')
    one_sentence(lambda: line_completion_samples(p))


@FUZZ
@given(source=st.text(alphabet=st.sampled_from(list('abf01 \t\n\r\x0c\x0b\u2028\x85()[]{}:=+-\'"\\#.,é')), max_size=60))
def test_source(source):
    import tokenize
    try: spelled = spell_out(source)
    except (SyntaxError, tokenize.TokenError, ValueError): return
    line = abstract(spelled, Literals(frozenset(), frozenset()))
    assert line.startswith('<s> ') and line.endswith(' </s>') and not set(line) & set('\n\r\t\x0b\x0c\x85\u2028')


@FUZZ
@given(profile=st.dictionaries(st.sampled_from(['about', 'runs', 'set', 'budgets', 'x']), JUNK | st.lists(BLOCKS, max_size=2), max_size=4))
def test_profiles(profile):
    one_sentence(lambda: expand(Profile(**profile), 'fuzzed', {}))


@FUZZ
@given(text=st.text(max_size=40))
def test_json_files(text, tmp_path_factory):
    p = tmp_path_factory.mktemp('r')/'x.json'
    p.write_text(text, encoding='utf-8', errors='replace')
    one_sentence(lambda: read_json(p))
