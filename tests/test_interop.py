"""Other people's tools open what is written here: transformers by its automatic classes, lm-evaluation-harness by a task."""
import json, os, subprocess, sys
from importlib.util import find_spec
import pytest, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from codegpt_nbc.core.paths import BASE_MODEL, write_json
from codegpt_nbc.data.samples import load_samples, load_texts
from codegpt_nbc.data.tokenizer import encode_batch, load_tokenizer
from codegpt_nbc.engines.generate import greedy, open_engine
from codegpt_nbc.engines.pytorch import TorchEngine
from codegpt_nbc.evidence.evaluate import evaluate, summarise
from codegpt_nbc.methods.quantize import quantize
from codegpt_nbc.methods.schemes import study_configurations, weight_schemes
from codegpt_nbc.methods.static_quantize import StaticScheme, calibrate, static_quantize
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.families import FAMILIES, is_regular
from codegpt_nbc.model.folder import INT8, SLICED, load_model, save_model
from codegpt_nbc.model.layers import Shape

VOCAB = load_tokenizer().get_vocab_size()
SHAPES = {'regular': ((2, 2), (32, 32)), 'sliced': ((1, 2), (24, 32)), 'emptied': ((0, 2), (32, 0))}
SCHEMES = {'float': None, 'int4': weight_schemes()} | {name: (s,) for name, s in study_configurations().items()}


def random_model(family: str, sizes: str, seed: int = 0) -> Decoder:
    heads, inner = SHAPES[sizes]
    model = Decoder(Shape(VOCAB, 64, 32, 16, heads, inner, family)).init_weights(seed)
    for p in model.parameters(): p.data *= 1 + 4*(p.ndim == 2)   # so that every part matters
    return model.eval()


def compare(folder):
    "The logits, the greedy text of two prompts of different lengths, and the token ids are those of this package."
    ours, theirs = load_model(folder), AutoModelForCausalLM.from_pretrained(folder)
    tok, texts = AutoTokenizer.from_pretrained(folder, padding_side='left'), ['<s> def f ( x ) : <EOL> return', '<s> import']
    rows = encode_batch(load_tokenizer(folder), texts)
    assert tok(texts).input_ids == rows
    with torch.no_grad(): z, want = theirs(torch.tensor(rows[:1])).logits, ours(torch.tensor(rows[:1]))
    torch.testing.assert_close(z, want, atol=1e-5*float(want.std()), rtol=1e-5)
    batch = tok(texts, return_tensors='pt', padding=True, return_token_type_ids=False)
    new = theirs.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=2)[:, batch.input_ids.shape[1]:]
    assert new.tolist() == greedy(TorchEngine(ours), rows, 5, -1)


@pytest.mark.parametrize('sizes', SHAPES)
@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_opens_in_every_shape(tmp_path, family, sizes):
    model = random_model(family, sizes)
    folder = save_model(model, tmp_path/'m')
    assert AutoConfig.from_pretrained(folder).model_type == (family if is_regular(model.shape) else SLICED + family)
    compare(folder)


@pytest.mark.parametrize('scheme', [s for s in SCHEMES if s != 'float'])
def test_every_quantised_folder_opens(tmp_path, scheme):
    for sizes in ('regular', 'sliced'):
        folder = save_model(quantize(random_model('gpt2', sizes), *SCHEMES[scheme]), tmp_path/sizes)
        assert AutoConfig.from_pretrained(folder).model_type == INT8 + 'gpt2'
        compare(folder)


def test_static_folders_open(tmp_path):
    q = quantize(random_model('llama', 'sliced'))
    ids = torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))
    folder = save_model(static_quantize(q, calibrate(q, [ids]), StaticScheme()), tmp_path/'m')
    compare(folder)


ORDERS = ['import codegpt_nbc; from transformers import AutoConfig, AutoModelForCausalLM',
          'from transformers import AutoModelForCausalLM, AutoConfig; import codegpt_nbc',
          'import transformers; import codegpt_nbc; from transformers import AutoConfig, AutoModelForCausalLM',
          'from transformers import GPT2LMHeadModel; import codegpt_nbc; from transformers import AutoConfig, AutoModelForCausalLM',
          'import codegpt_nbc; from transformers import AutoConfig, AutoTokenizer; from transformers import AutoModelForCausalLM']


@pytest.mark.parametrize('order', ORDERS)
def test_either_package_may_be_imported_first(tmp_path, order):
    folder = save_model(random_model('gpt2', 'sliced'), tmp_path/'m')
    program = f'{order}\nprint(AutoConfig.from_pretrained({str(folder)!r}).model_type)\n' \
              f'print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.stdout.split() == [SLICED + 'gpt2', 'DecoderForCausalLM'], done.stderr


def test_the_import_alone_imports_nothing():
    program = 'import sys; before = set(sys.modules); import codegpt_nbc; print(*sorted(set(sys.modules) - before))'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.stdout.split() == ['codegpt_nbc']


def test_no_notebook_waits_for_a_grammar():
    "jsonschema imports rfc3987_syntax from 4.25 on, which builds twenty parsers: 3 s of every notebook and of JupyterLab."
    program = 'import sys, nbformat; print("rfc3987_syntax" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.stdout.split() == ['False'], done.stdout + done.stderr


def test_older_transformers_is_left_alone():
    "Its automatic classes have other interfaces; what imports them must not fail."
    program = ('import sys, types; old = types.ModuleType("transformers"); old.__version__ = "4.45.2"; sys.modules["transformers"] = old\n'
               'import codegpt_nbc; codegpt_nbc._register("transformers.models.auto.modeling_auto")\n'
               'assert "codegpt_nbc.engines.auto_model" not in sys.modules')
    assert subprocess.run([sys.executable, '-c', program]).returncode == 0


def raw_folder(home, heads=(2, 2)):
    "A model of raw source with random weights, whose tokenizer has no word of CodeXGLUE's format."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=['<|end|>'], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(load_texts(n=40, text='raw'), trainer)
    (home/'tokenizer').mkdir()
    PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='<|end|>').save_pretrained(home/'tokenizer')
    write_json(home/'tokenizer'/'config.json', {'eos_token_id': 0})
    model = Decoder(Shape(tok.get_vocab_size(), 96, 32, 16, heads, (64, 64))).init_weights(0)
    for p in model.parameters(): p.data *= 1 + 4*(p.ndim == 2)
    return save_model(model, home/'m', parent=home/'tokenizer')


def by_harness(folder, protocol: str, n: int, home) -> tuple: # (scores, samples in order)
    "What the harness's command writes of a task of our samples."
    from codegpt_nbc.evidence.harness import write_task
    task = write_task(home/'task', protocol, n)
    command = [sys.executable, '-m', 'codegpt_nbc.evidence.harness', 'run', '--model', 'codegpt_nbc', '--tasks', task,
               '--model_args', f'pretrained={folder},dtype=float32', '--include_path', str(home/'task'), '--batch_size', '4',
               '--device', 'cpu', '--output_path', str(home/'out'), '--log_samples']
    cache = {'HF_DATASETS_CACHE': str(home/'cache')}
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=os.environ | cache)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next((home/'out').rglob('results_*.json')).read_text())['results'][task]
    each = [json.loads(line) for line in next((home/'out').rglob('samples_*.jsonl')).read_text().splitlines()]
    return found, sorted(each, key=lambda s: s['doc_id'])


@pytest.mark.skipif(not find_spec('lm_eval'), reason='lm-evaluation-harness is not installed: pip install -r requirements-interop.txt')
@pytest.mark.parametrize('model', ['float', 'int4', 'raw', 'raw sliced'])
def test_the_harness_scores_as_we_do(tmp_path, model):
    protocol, n = ('line', 24) if 'raw' in model else ('codexglue', 12)
    if model == 'float': folder = BASE_MODEL
    elif model == 'int4': folder = save_model(quantize(load_model(BASE_MODEL), *SCHEMES[model]), tmp_path/'m')
    else: folder = raw_folder(tmp_path, (1, 2) if 'sliced' in model else (2, 2))
    found, each = by_harness(folder, protocol, n, tmp_path)
    scores, seconds = evaluate(*open_engine(folder, threads=1), protocol, n)
    want = summarise(scores, seconds)
    assert (round(100*found['em,none'], 3), round(found['es,none'], 3)) == (want.em, want.es) and want.es
    assert [s['es'] for s in each] == scores.es.tolist()
    assert [s['doc']['gt'] for s in each] == load_samples(protocol, n)['gt'].tolist()
