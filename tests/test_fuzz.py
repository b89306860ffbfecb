"""Mutated configurations, tokenizers, weights, ONNX folders, code, parameters and profiles: one sentence or a right answer,
never a traceback of another kind.

`CODEGPT_NBC_FUZZ=10000` tries so many inputs of each kind; by default few, with fixed seeds. Failures that were found stand as examples."""
import json, os, random, struct, subprocess, sys, warnings
from contextlib import chdir
from pathlib import Path
import nbformat, numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from codegpt_nbc.core.paths import SEAL, read_json, sealed, write_json
from codegpt_nbc.data.codexglue import line_completion_samples
from codegpt_nbc.data.text_format import Literals, abstract, spell_out
from codegpt_nbc.data.tokenizer import encode_batch, load_tokenizer, save_tokenizer, train_tokenizer
from codegpt_nbc.engines.generate import complete, open_engine
from codegpt_nbc.engines.onnx_export import export_onnx
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


@pytest.mark.parametrize('prefix', ['é', 'a b'])
def test_a_tokenizer_that_makes_its_library_panic_is_a_sentence(folders, prefix, tmp_path):
    t = json.loads((folders[0]/'tokenizer.json').read_text(encoding='utf-8'))
    t['model']['continuing_subword_prefix'] = prefix
    (tmp_path/'tokenizer.json').write_text(json.dumps(t), encoding='utf-8')
    with pytest.raises(ValueError, match='damaged'): encode_batch(load_tokenizer(tmp_path), ['def f ( x ) : <EOL> return x'])


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


# ONNX

# Of more tokens than `PROMPT` of the engine, so that int4 takes its graph for prompts
PROMPT = 'def f ( x ) : <EOL> return x , x , x , x , x'


@pytest.fixture(scope='module')
def exported(folders, tmp_path_factory):
    "Folder → its completion."
    d = tmp_path_factory.mktemp('onnx')
    made = [export_onnx(folders[i], d/f'{i}-{precision}', precision) for i, precision in ((0, 'int8'), (1, 'int4'), (0, 'fp32'))]
    return {folder: complete(*open_engine(folder, threads=1), PROMPT, 4) for folder in made}


def copied(source, d, config=None, graph=None) -> Path:
    "A copy of an ONNX folder with another config.json or model.onnx."
    for p in source.iterdir(): (d/p.name).write_bytes(p.read_bytes())
    if config is not None: (d/'config.json').write_text(json.dumps(config))
    if graph is not None: (d/'model.onnx').write_bytes(graph)
    return d


def answer(folder): return complete(*open_engine(folder, threads=1), PROMPT, 4)


@FUZZ
@given(which=st.integers(0, 2), at=st.integers(0, 10**7), byte=st.integers(1, 255), cut=st.none() | st.integers(0, 10**7))
def test_onnx_files(exported, which, at, byte, cut, tmp_path_factory):
    source = [*exported][which]
    data = bytearray((source/'model.onnx').read_bytes())
    data[at % len(data)] ^= byte
    if cut is not None: data = data[:cut % len(data)]
    d = copied(source, tmp_path_factory.mktemp('o'), graph=bytes(data))
    with pytest.raises(ValueError, match='truncated or corrupt') as e: answer(d)
    assert '\n' not in str(e.value)


@FUZZ
@given(which=st.integers(0, 2), changes=st.dictionaries(st.integers(0, 40), st.just('drop') | JUNK, min_size=1, max_size=3),
       inner=st.dictionaries(st.sampled_from(['context', 'by_row', 'int8_prompts', 'precision']), st.just('drop') | JUNK, max_size=2))
def test_onnx_configurations(exported, which, changes, inner, tmp_path_factory):
    source = [*exported][which]
    config = whole = read_config(source)
    config = config | {'onnx': dict(config['onnx'])}
    outer = [(config, [*config][i % len(config)], value) for i, value in changes.items()]
    for place, key, value in outer + [(config['onnx'], key, value) for key, value in inner.items()]:
        if value == 'drop': place.pop(key, None)
        else: place[key] = value
    if config == whole: return
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        got = one_sentence(lambda: answer(copied(source, tmp_path_factory.mktemp('o'), config)))
    if got is not None:   # only without the seal, and with a warning that says so
        assert SEAL not in config and any('states no checksums' in str(w.message) for w in warned)
        if {k: v for k, v in whole.items() if k != SEAL} == config: assert got == exported[source]


def changed_graph(data: bytes, chance) -> bytes:
    "An ONNX file with one fault: swapped or misshapen tensors, wrong names, attributes, inputs or bytes."
    import onnx
    from onnx import numpy_helper
    kind = chance.choice(['byte', 'swap', 'shape', 'name', 'attribute', 'input'])
    if kind == 'byte':
        data = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            at = chance.choice([chance.randrange(len(data)), chance.randrange(4000)])
            data[at] = chance.randrange(256)
        return bytes(data)
    m = onnx.load_from_string(data)
    g = m.graph
    tensor, node = chance.choice(g.initializer), chance.choice([n for n in g.node if n.attribute and n.input])
    if kind == 'swap':
        other = chance.choice(g.initializer)
        tensor.name, other.name = other.name, tensor.name
    elif kind == 'shape':
        w = numpy_helper.to_array(tensor)
        shapes = [w.reshape(-1), w[:1] if w.ndim else w, w.T, w.astype(np.float64), w[..., None], np.zeros((0,)*max(1, w.ndim), w.dtype)]
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(chance.choice(shapes)), tensor.name))
    elif kind == 'name': node.input[chance.randrange(len(node.input))] = tensor.name
    elif kind == 'attribute': chance.choice(node.attribute).i = chance.choice([0, -1, 3, 7, 100, 2**31])
    else: chance.choice(g.input).type.tensor_type.shape.dim[-1].dim_value = chance.choice([0, 3, 1000])
    return m.SerializeToString()


def try_graphs(source: str, place: str, first: int, last: int):
    "Whoever seals a broken graph gets one sentence, or what the graph says. Run in a process of its own, which must not die."
    source, d, bare = Path(source), Path(place)/'m', Path(place)/'bare'
    for folder in (d, bare): folder.mkdir(parents=True)
    whole = (source/'model.onnx').read_bytes()
    config = {k: v for k, v in read_config(source).items() if k != SEAL}
    for seed in range(first, last):
        print(seed, flush=True)
        graph = changed_graph(whole, random.Random(seed))
        (bare/'model.onnx').write_bytes(graph)
        copied(source, d, graph=graph)
        write_json(d/'config.json', sealed(bare, config))
        try: answer(d)
        except SENTENCE as e: assert str(e).strip()
    print('done')


@pytest.mark.parametrize('which', [0, 1, 2])
def test_graphs_that_are_broken_and_sealed(exported, which, tmp_path):
    n = max(20, N//3)
    code = f'import test_fuzz; test_fuzz.try_graphs({str([*exported][which])!r}, {str(tmp_path)!r}, {which*n}, {which*n + n})'
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT/'tests')]), 'OMP_NUM_THREADS': '1'}
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert p.returncode == 0 and p.stdout.split()[-1] == 'done', f'seed {p.stdout.split()[-1:]}: {p.stderr[-2000:]}'


# Parameters of every template

ROOT = Path(__file__).resolve().parent.parent
ODD = st.sampled_from([float('nan'), float('inf'), -float('inf'), -1, 0, 2**63, 10**400, 1e308, -0., 'nan', '', ' ', '..', '../..',
                       '/', 'a/b', '\0', '\ud800', 'é'*300, '{x}', '%s', '$HOME', 'None',
                       "'; import os", True, None, [], {}, [[]], [{}], {'': None}])


def template_cells() -> dict: # template → (name → default, code that makes the configuration)
    found = {}
    for path in sorted((ROOT/'nbs'/'experiments').glob('*.ipynb')):
        cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code']
        exec(cells[0], scope := {})
        found[path.stem] = {name: value for name, value in scope.items() if name != '__builtins__'}, cells[1]
    return found


CELLS = template_cells()
NAMES = st.integers(0, 30) | st.sampled_from(['sparsty', 'Seed', '__class__', 'model_config', 'é', 'cfg'])


@FUZZ
@given(template=st.sampled_from(sorted(CELLS)), changes=st.dictionaries(NAMES, JUNK | ODD, min_size=1, max_size=3))
def test_parameters_of_templates(template, changes, tmp_path_factory):
    names, code = CELLS[template]
    own = {[*names][k % len(names)] if isinstance(k, int) else k: v for k, v in changes.items()}
    if own.get('data') not in (None, '', []): own.pop('data')   # a folder is read: see `test_odd_folders_of_data`
    scope = names | {'codexglue': 0, 'thesis': 0} | own
    def made():
        with warnings.catch_warnings(action='ignore'): exec(code, scope)
        return scope['cfg']
    with chdir(tmp_path_factory.mktemp('t')): cfg = one_sentence(made)
    if cfg is None: return
    for name in set(own) & set(type(cfg).model_fields):   # what is accepted is what was given, or its value in the type that is declared
        got = getattr(cfg, name)
        assert got == own[name] or float(got) == float(own[name]) or str(got) == str(own[name]), (name, own[name], got)
        assert got == got and got not in (float('inf'), -float('inf')), f'{name} is {got}'


FOLDERS = ['..', 'nowhere', '\0', '~', 'a'*5000, 'file.txt', 'empty', 'a/b', 'a/b@', 'x + y', ' + ', '../../nowhere']


@pytest.mark.parametrize('data', FOLDERS)
def test_odd_folders_of_data(data, tmp_path):
    from codegpt_nbc.data.inputs import resolve_data
    for place in (tmp_path/'a', tmp_path/'a'/'empty'): place.mkdir()
    (tmp_path/'a'/'file.txt').write_text('')
    with chdir(tmp_path/'a'), pytest.raises(SENTENCE) as e: resolve_data(data)
    assert '\n' not in str(e.value).strip()
