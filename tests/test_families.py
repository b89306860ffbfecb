"""Every family: as transformers computes it, and through every method. docs/matrix.md is made by the last test.

The weights are random, the sizes tiny, the depth real: twelve layers. `CODEGPT_NBC_MATRIX=write` writes the table anew, and
`CODEGPT_NBC_MATRIX=new` the cells that it lacks.
A further engine is one more line of `ENGINES`, a further method one more line of `METHODS`.
Other engines than PyTorch run on every fifth cell, and on all of them with `CODEGPT_NBC_MATRIX=all`, which takes half an hour."""
import itertools, json, os, warnings
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
import numpy as np, pytest, torch, transformers
from safetensors.torch import load_file, save_file
from codegpt_nbc.data.tokenizer import encode_batch, load_tokenizer, save_tokenizer, train_tokenizer
from codegpt_nbc.engines.generate import greedy
from codegpt_nbc.engines.onnx_export import export_onnx
from codegpt_nbc.engines.onnx_run import OrtEngine
from codegpt_nbc.engines.openvino import OpenvinoEngine, export_openvino
from codegpt_nbc.engines.pytorch import TorchEngine
from codegpt_nbc.engines.session import PromptLookup, Session
from codegpt_nbc.methods.distill import DistillConfig, distill, reduced_student, spread
from codegpt_nbc.methods.gptq import gptq
from codegpt_nbc.methods.prune import PATTERNS, TILES, PruneConfig, prune
from codegpt_nbc.methods.quantize import in_precision, quantize
from codegpt_nbc.methods.ranges import EmbeddingGroups
from codegpt_nbc.methods.schemes import study_configurations, weight_schemes
from codegpt_nbc.methods.static_quantize import calibrate, per_embedding_group, static_quantize
from codegpt_nbc.methods.vocabulary import choose_tokens, count_tokens, rank_tokens, save_trimmed, trim
from codegpt_nbc.methods.xtc import XtcConfig, xtc
from codegpt_nbc.model.convert_format import with_words
from codegpt_nbc.model.decoder import count_of, count_parameters, with_layers
from codegpt_nbc.model.families import FAMILIES
from codegpt_nbc.model.folder import load_model, read_config, save_model, shape_of_config

TABLE = Path(__file__).resolve().parent.parent/'docs'/'matrix.md'
LAYERS, WORDS, CONTEXT = 12, 284, 64
LINE = '<s> ' + ' <EOL> '.join(f'def f{i} ( x ) : <EOL> return x + y{i} * z' for i in range(12)) + ' </s>'   # of more than 100 tokens
TEXTS = [LINE.replace('x', f'x{i}') for i in range(8)]

# Configurations of transformers, small

SIZES = dict(vocab_size=WORDS, bos_token_id=0, eos_token_id=1, pad_token_id=2)
GPT = SIZES | dict(n_embd=32, n_layer=LAYERS, n_head=4, n_inner=48, n_positions=CONTEXT)
WIDE = SIZES | dict(hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48, max_position_embeddings=CONTEXT)
GROUPED = WIDE | dict(num_key_value_heads=2)
LLAMA3 = dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16)
T = transformers
PLAIN = {   # one of each family
    'gpt2': (T.GPT2Config, GPT), 'gpt_bigcode': (T.GPTBigCodeConfig, GPT), 'llama': (T.LlamaConfig, GROUPED),
    'qwen2': (T.Qwen2Config, GROUPED), 'qwen3': (T.Qwen3Config, GROUPED | dict(head_dim=16)),
    'mistral': (T.MistralConfig, GROUPED | dict(sliding_window=None)), 'starcoder2': (T.Starcoder2Config, GROUPED),
    'gptj': (T.GPTJConfig, GPT | dict(rotary_dim=4)), 'codegen': (T.CodeGenConfig, GPT | dict(rotary_dim=4)),
    'gpt_neox': (T.GPTNeoXConfig, WIDE | dict(rotary_pct=.5)),
}
VARIED = {  # what configurations of a family may vary
    'gpt2, exact gelu': (T.GPT2Config, GPT | dict(activation_function='gelu')),
    'gpt_bigcode, multi-head': (T.GPTBigCodeConfig, GPT | dict(multi_query=False)),
    'llama, biases': (T.LlamaConfig, GROUPED | dict(attention_bias=True, mlp_bias=True)),
    'llama, linear rope': (T.LlamaConfig, GROUPED | dict(rope_scaling=dict(rope_type='linear', factor=4.))),
    'llama, llama3 rope': (T.LlamaConfig, GROUPED | dict(rope_scaling=LLAMA3)),
    'llama, wide heads': (T.LlamaConfig, GROUPED | dict(head_dim=16, hidden_act='gelu')),
    'mistral, window': (T.MistralConfig, GROUPED | dict(sliding_window=24)),
    'starcoder2, no biases': (T.Starcoder2Config, GROUPED | dict(use_bias=False, hidden_act='gelu_fast')),
    'gpt_neox, in turn': (T.GPTNeoXConfig, WIDE | dict(use_parallel_residual=False, attention_bias=False, rotary_pct=1.)),
}


def theirs_of(kind, tied=None):
    "A model of transformers whose every parameter matters."
    config, settings = (PLAIN | VARIED)[kind]
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config(**settings, **({} if tied is None else {'tie_word_embeddings': tied}))).eval()
    for p in model.parameters(): p.data += (.15 if p.ndim > 1 else .1)*torch.randn_like(p)
    model.tie_weights()
    return model


def off(a, b): return float((a - b).abs().max()/b.std())   # in spreads of the logits


@pytest.fixture(autouse=True)
def quiet():
    T.logging.set_verbosity_error()
    T.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='the attention of this .* model slides a window')
        yield


# Against transformers

@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
@pytest.mark.parametrize('kind', PLAIN | VARIED)
def test_logits_are_those_of_transformers_and_again_after_a_round_trip(kind, tied, tmp_path):
    "From shards in bfloat16 with an index, as published models come."
    theirs_of(kind, tied).bfloat16().save_pretrained(tmp_path/'theirs', max_shard_size='60KB')
    assert (tmp_path/'theirs'/'model.safetensors.index.json').is_file() and len([*(tmp_path/'theirs').glob('*.safetensors')]) > 2
    ids, theirs = torch.arange(2*20).view(2, 20)*7 % WORDS, T.AutoModelForCausalLM.from_pretrained(tmp_path/'theirs', dtype=torch.float32)
    ours = load_model(tmp_path/'theirs')
    assert ours.shape.tied == tied and ours.shape.n_layer == LAYERS and count_of(ours.shape) == count_parameters(ours)[0]
    with torch.no_grad():
        want = theirs(ids).logits
        assert off(ours(ids), want) <= 1e-5
        again = T.AutoModelForCausalLM.from_pretrained(save_model(ours, tmp_path/'again', parent=tmp_path/'theirs'), dtype=torch.float32)
        assert off(again(ids).logits, want) <= 1e-5
    assert read_config(tmp_path/'again')['torch_dtype'] == 'bfloat16'
    assert load_model(tmp_path/'again').shape == ours.shape


@pytest.mark.parametrize('kind', PLAIN | VARIED)
def test_greedy_text_is_that_of_transformers_over_a_batch_of_unequal_lengths(kind, tmp_path):
    theirs, lengths, new = theirs_of(kind), (3, 17, 9, 1), 7    # within the narrowest window
    theirs.save_pretrained(tmp_path/'m')
    prompts = [[(7*i + 11*n) % (WORDS - 3) + 3 for i in range(n)] for n in lengths]
    ids = torch.tensor([[2]*(max(lengths) - len(p)) + p for p in prompts])              # padded on the left
    seen = torch.tensor([[0]*(max(lengths) - len(p)) + [1]*len(p) for p in prompts])
    out = theirs.generate(ids, attention_mask=seen, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=2)
    assert greedy(TorchEngine(tmp_path/'m'), prompts, new, stop=-1) == out[:, max(lengths):].tolist()


def test_a_window_caps_the_context_and_the_configuration_stays(tmp_path):
    theirs_of('mistral, window').save_pretrained(tmp_path/'m')
    with pytest.warns(UserWarning, match='slides a window of 24 positions over 64: the context is capped at 24') as seen:
        model = load_model(tmp_path/'m')
    assert len(seen) == 1 and model.shape.context == 24
    config = read_config(save_model(model, tmp_path/'again', parent=tmp_path/'m'))
    assert (config['max_position_embeddings'], config['sliding_window']) == (64, 24)


REFUSED = {  # what a configuration says → the sentence
    'llama, yarn': ('llama', {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.}}, "the kind 'yarn' are not supported"),
    'llama, dynamic': ('llama', {'rope_scaling': {'type': 'dynamic', 'factor': 4.}}, "the kind 'dynamic' are not supported"),
    'llama, longrope': ('llama', {'rope_parameters': {'rope_type': 'longrope'}}, "the kind 'longrope' are not supported"),
    'llama, relu': ('llama', {'hidden_act': 'relu'}, "whose hidden_act is 'relu' is not supported"),
    'experts': ('mistral', {'model_type': 'mixtral'}, "the architecture 'mixtral' is not supported: use one of gpt2, gpt_bigcode, llama"),
    'gpt2, unscaled': ('gpt2', {'scale_attn_weights': False}, 'whose scale_attn_weights is False is not supported'),
    'codegen, 6 heads': ('codegen', {'n_head': 2}, '2 heads cannot be packed in 4 blocks'),
    'gptj, 5 channels': ('gptj', {'rotary_dim': 5}, '5 of 8 channels cannot be turned in pairs'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_not_computed_is_refused_in_one_sentence(case, tmp_path):
    kind, change, sentence = REFUSED[case]
    theirs_of(kind).save_pretrained(tmp_path/'m')
    config = {k: v for k, v in read_config(tmp_path/'m').items() if k != 'rope_parameters'} | change
    (tmp_path/'m'/'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence) as e: load_model(tmp_path/'m')
    assert one_sentence(str(e.value))


JUNK = [None, True, False, 0, -1, 3, 1.5, float('nan'), 'x', [], ['full_attention'], {}, {'rope_type': 'llama3', 'factor': 2.}, 10**12]


@pytest.mark.parametrize('family', PLAIN)
def test_any_value_in_a_configuration_is_read_or_refused_in_one_sentence(family, tmp_path):
    config, settings = PLAIN[family]
    config(**settings).save_pretrained(tmp_path)
    whole = read_config(tmp_path) | {'rope_scaling': None}
    whole |= {key: True for key in whole if key == 'use_sliding_window'}
    for key, junk in itertools.product(whole, JUNK):
        try: shape_of_config(whole | {key: junk})
        except ValueError as e: assert '\n' not in str(e), (key, junk, e)


def test_a_packed_tensor_of_another_size_is_named(tmp_path):
    theirs_of('gpt_bigcode').save_pretrained(tmp_path/'m')
    config = read_config(tmp_path/'m') | {'multi_query': False}
    (tmp_path/'m'/'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'transformer.h.0.attn.c_attn.weight' does not fit: it has 48 rows, but .* asks for 96") as e:
        load_model(tmp_path/'m')
    assert one_sentence(str(e.value))


BUFFERS = {
    'gpt2': 'transformer.h.0.attn.bias',
    'llama': 'model.layers.0.self_attn.rotary_emb.inv_freq',
    'gptj': 'transformer.h.0.attn.masked_bias',
    'codegen': 'transformer.h.0.attn.causal_mask',
    'gpt_neox': 'gpt_neox.layers.0.attention.bias',
}


@pytest.mark.parametrize('family', BUFFERS)
def test_masks_of_old_files_are_passed_over(family, tmp_path):
    theirs_of(family).save_pretrained(tmp_path)
    file = tmp_path/'model.safetensors'
    save_file(load_file(file) | {BUFFERS[family]: torch.ones(2)}, file, metadata={'format': 'pt'})
    load_model(tmp_path)


@pytest.mark.parametrize('family', ['gpt2', 'gpt_bigcode', 'starcoder2'])
def test_a_base_model_saved_without_its_head_is_read(family, tmp_path):
    theirs, ids = theirs_of(family, tied=True), torch.arange(20)[None]
    theirs.base_model.save_pretrained(tmp_path)
    with torch.no_grad(): assert off(load_model(tmp_path)(ids), theirs(ids).logits) <= 1e-5


def one_sentence(text): return '\n' not in text and text.endswith('.') and '. ' not in text


# Methods: a function of the source's model, tokenizer and rows → (model, tokenizer or None, True or what is wrong)

@dataclass
class Source:
    "A family's model in a folder, what it reads, and the logits it gives."
    folder: Path
    model: object
    tok: object
    rows: list         # of lists of ids
    windows: object    # (8, 24) ids

    def fresh(self): return load_model(self.folder)


@dataclass
class Made:
    "What a method made of a source."
    model: object
    tok: object = None         # None: the source's
    wrong: str = ''            # what the method did not do, if anything
    sound: float = 0.          # least correlation of its logits with the source's; 0: not compared
    kept: list = field(default_factory=list)   # ids of the source that the logits are compared on; empty: all


def pruned(source, pattern):
    ranked = {} if pattern in TILES else {'importance': 'norm'}      # single weights and tiles have a rank of their own
    c = PruneConfig(run_id='t', pattern=pattern, sparsity=.25, samples=4, batch=4, length=24, lr=1e-4, **ranked)
    model, report = prune(source.fresh(), source.rows[:4], c)
    slack = .03 if pattern == 'structured' else .005
    return Made(model, wrong='' if abs(report.sparsity - .25) < slack else f'a sparsity of {report.sparsity}')


def quantized(source, schemes, sound): return Made(quantize(source.model, *schemes), sound=sound)


def rounded(source): return Made(gptq(source.model, source.windows, *weight_schemes(4, 32, False)), sound=.5)


def static(source):
    q = quantize(source.model)
    seen = calibrate(q, [source.windows])
    groups = EmbeddingGroups(groups=4, permute=True)
    return Made(static_quantize(q, seen, *per_embedding_group(groups)), sound=.5)


def extreme(source, bits):
    c = XtcConfig(run_id='t', layers=.5, bits=bits, length=24, batch=8, tokens=8*23*2, lr=1e-3)
    student = with_layers(source.model, spread(LAYERS, LAYERS//2))
    model, result, curves = xtc(student, source.fresh(), source.rows, c)
    return Made(model, wrong='' if np.isfinite(curves['total'][-1][1]) and model.shape.n_layer == LAYERS//2 else 'no loss')


def distilled(source):
    c = DistillConfig(run_id='t', layers=.5, choice='spread', length=24, batch=8, tokens=8*23*3, warmup=0., lr=1e-3)
    student = reduced_student(source.model, spread(LAYERS, LAYERS//2), 0)
    result = distill(student, source.fresh(), source.rows, c)
    learned = result.curve[-1][1] < result.curve[0][1]
    return Made(student.eval(), wrong='' if learned else f'losses of {result.curve}')


def trimmed(source):
    kept = choose_tokens(rank_tokens(source.tok, count_tokens(source.tok, TEXTS)), size=WORDS - 8)
    small, tok = trim(source.model, source.tok, kept)
    return Made(small, tok, sound=.999, kept=kept)


def adopted(source):
    model, tok = with_words(source.model, source.tok, ['<STR_LIT:utf-8>', '<NUM_LIT:1>'])
    return Made(model, tok, sound=.999, kept=list(range(WORDS)))


STUDY = {f'quantise, {name}': partial(quantized, schemes=[s], sound=.9) for name, s in study_configurations().items()}
METHODS = {
    'none': lambda source: Made(source.model, sound=.999),
    **{f'prune, {pattern}': partial(pruned, pattern=pattern) for pattern in PATTERNS},
    **STUDY,
    'quantise, 4 bits in blocks': partial(quantized, schemes=weight_schemes(), sound=.5),
    'GPTQ, 4 bits': rounded,
    'static, groups': static,
    'XTC, 1 bit': partial(extreme, bits=1), 'XTC, 2 bits': partial(extreme, bits=2), 'XTC, layers': partial(extreme, bits=32),
    'distil': distilled,
    'trim vocabulary': trimmed,
    'convert format': adopted,
}

# Engines

@dataclass
class Runner:
    "How an engine runs a folder, and what is asked of it."
    opened: object          # function of a folder and a path to write to → engine
    precision: str = ''     # in which PyTorch computes the logits to compare with; '': those of the model that was saved
    off: float = 1e-4       # what its logits may be off by, in spreads
    rounds: bool = False    # it rounds inputs pass by pass, so a text that is read in pieces may go on otherwise


def in_onnx(precision): return lambda folder, out: OrtEngine(export_onnx(folder, out, precision), threads=1)


def in_openvino(precision): return lambda folder, out: OpenvinoEngine(export_openvino(folder, out, precision), threads=1)


ENGINES = {'PyTorch': Runner(lambda folder, out: TorchEngine(folder), off=1e-5)}
for kind, made in (('ONNX', in_onnx), ('OpenVINO', in_openvino)):
    ENGINES |= {f'{kind}, fp32': Runner(made('fp32'), 'fp32'), f'{kind}, int8': Runner(made('int8'), 'int8', 1., True),
                f'{kind}, int4': Runner(made('int4'), 'int4', 1., True)}
MISSING = () if find_spec('openvino') else tuple(e for e in ENGINES if e.startswith('OpenVINO'))
COMPLETE = ('PyTorch', 'ONNX, fp32', 'ONNX, int8', 'OpenVINO, fp32', 'OpenVINO, int8')   # engines that refuse nothing


class Workshop:
    "Makes every source, every folder and every outcome once."
    def __init__(self, root):
        self.root, self.sources, self.folders, self.outcomes = root, {}, {}, {}
        self.tok = train_tokenizer(TEXTS, [], WORDS)
        assert self.tok.get_vocab_size() == WORDS
        self.rows = [row[:24] for row in encode_batch(self.tok, TEXTS)]

    def source(self, family) -> Source:
        if family not in self.sources:
            folder = self.root/family
            theirs_of(family).save_pretrained(folder)
            save_tokenizer(self.tok, folder)
            model, windows = load_model(folder), torch.tensor(self.rows)
            self.sources[family] = Source(folder, model, load_tokenizer(folder), self.rows, windows)
        return self.sources[family]

    def folder(self, family, method) -> tuple: # (folder, logits of the model in memory (8, vocab)); raises what the method raises
        if (family, method) not in self.folders:
            source, out = self.source(family), self.root/f'{family}-{len(self.folders)}'
            made = METHODS[method](source)
            assert not made.wrong, made.wrong
            if made.tok is None: save_model(made.model, out, parent=source.folder)
            else: save_trimmed(made.model, made.tok, out, source.folder)
            self.folders[family, method] = out, self.check(source, made)
        return self.folders[family, method]

    @torch.no_grad()
    def check(self, source, made) -> torch.Tensor: # logits (8, vocab)
        "Logits of the model in memory, which must be finite and like the source's as far as the method promises."
        ids = source.windows.remainder(made.model.shape.vocab)
        logits = made.model.eval()(ids)[:, -1]
        assert logits.isfinite().all() and logits.std() > 0
        kept = made.kept or list(range(WORDS))
        if made.sound:
            old = source.model(torch.tensor(kept)[ids.clamp_max(len(kept) - 1)])[:, -1, kept]
            new = made.model(ids.clamp_max(len(kept) - 1))[:, -1, :len(kept)]
            alike = float(torch.corrcoef(torch.stack([old.flatten(), new.flatten()]))[0, 1])
            assert alike > made.sound, alike
        return logits

    def outcome(self, family, method, engine) -> str:
        "'' where the folder runs and its logits are those of the model that was saved; else the sentence that refuses it."
        key = family, method, engine
        if key not in self.outcomes: self.outcomes[key] = self._run(*key)
        return self.outcomes[key]

    def _run(self, family, method, engine) -> str:
        runner = ENGINES[engine]
        folder, want = (self.source(family).folder, None) if method == SESSION else self.folder(family, method)
        try: e = runner.opened(folder, self.root/'written')
        except ValueError as refusal:
            assert one_sentence(str(refusal)), refusal
            return str(refusal)
        if method == SESSION: return self.session(family, e, runner.rounds)
        ids = self.source(family).windows.remainder(e.vocab).numpy()
        if runner.precision: want = self.read(TorchEngine(in_precision(load_model(folder), runner.precision)), ids)
        logits = self.read(e, ids)
        assert off(logits, want) <= runner.off, off(logits, want)
        return ''

    @staticmethod
    def read(e, ids) -> torch.Tensor: # (8, vocab)
        "The logits after each window."
        e.start(len(ids), ids.shape[1] + 1)
        return torch.from_numpy(e.prefill(ids, np.full(len(ids), ids.shape[1])))

    def session(self, family, e, rounds) -> str:
        "A session that is edited reads what is new, and writes what the engine writes anew."
        source = self.source(family)
        s = Session(e, source.tok, max_new=8, drafts=PromptLookup(), until_eol=False)
        for i, text in enumerate((TEXTS[0][:60], TEXTS[0][:80], TEXTS[1][:70])):
            s.complete(text)
            ids = encode_batch(source.tok, [text])[0]
            assert s.read + s.reused == len(ids) and bool(s.reused) == bool(i)
            assert rounds or [*s.written.tokens] == greedy(e, [ids], 8, stop=-1)[0]
        return ''


SESSION = 'session'
ROWS = [*METHODS, SESSION]


@pytest.fixture(scope='module')
def workshop(tmp_path_factory): return Workshop(tmp_path_factory.mktemp('families'))


MATRIX = os.environ.get('CODEGPT_NBC_MATRIX', '')   # 'all': every cell; 'write': and the table; 'new': what the table lacks
CELLS = [(family, method, engine) for (i, family), (j, method), engine in itertools.product(enumerate(PLAIN), enumerate(ROWS), ENGINES)
         if MATRIX or engine == 'PyTorch' or (i + j) % 5 == 0]


@pytest.mark.parametrize('family, method, engine', CELLS)
def test_each_method_makes_a_folder_that_runs_or_says_why_not(family, method, engine, workshop):
    if engine in MISSING: pytest.skip('OpenVINO is not installed here')
    outcome = workshop.outcome(family, method, engine)
    assert not outcome or engine not in COMPLETE
    if MATRIX not in ('write', 'new'):
        assert outcome == RECORDED[engine, method, family], 'run CODEGPT_NBC_MATRIX=write pytest tests/test_families.py'


def test_every_family_is_in_the_matrix(): assert [*PLAIN] == [*FAMILIES]


# The table

ABOUT = """# Families, methods and engines

Each cell is a model of twelve layers with random weights, made with `transformers`, sent through the method, saved, and read by the engine.
✓: the logits are those of PyTorch in the same precision, to within what the engine rounds, and the method did what it promises.
A number: the combination is refused before work begins, with the sentence of that number below.
`tests/test_families.py` makes this page and checks that it is up to date.
"""
SHORT, NOTES = 'In short', 'Why not'


def recorded() -> dict: # (engine, method, family) → '' or the sentence that refuses it
    "The table in the docs."
    sections = dict(part.split('\n', 1) for part in TABLE.read_text(encoding='utf-8').split('\n## ')[1:]) if TABLE.is_file() else {}
    sections.pop(SHORT, None)
    numbered = dict(line.split('. ', 1) for line in sections.pop(NOTES, '').splitlines() if line)
    out = {}
    for engine, table in sections.items():
        (_, *families), _, *rows = ([cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines() if line)
        out |= {(engine, row[0], family): numbered.get(cell, '') for row in rows for family, cell in zip(families, row[1:])}
    return out


RECORDED = recorded()


def as_table(head: list, rows: list) -> str:
    lines = [head, ['---', *[':-:']*(len(head) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def table_of(outcome) -> str: # a function (family, method, engine) → '' or a sentence
    cells, sentences = {}, []
    for engine, method, family in itertools.product(ENGINES, ROWS, PLAIN):
        said = outcome(family, method, engine)
        if said and said not in sentences: sentences.append(said)
        cells[engine, method, family] = str(sentences.index(said) + 1) if said else '✓'

    def in_short(engine, method) -> str: # one cell for all families
        found = [cells[engine, method, family] for family in PLAIN]
        return found[0] if len(set(found)) == 1 else f'{found.count("✓")} of {len(PLAIN)}'
    short = as_table(['method', *ENGINES], [[m, *(in_short(e, m) for e in ENGINES)] for m in ROWS])
    about = f'The {len(PLAIN)} families together; the tables after this one tell them apart.'
    sections = [f'## {SHORT}\n\n{about}\n\n{short}']
    for engine in ENGINES:
        rows = [[m, *(cells[engine, m, family] for family in PLAIN)] for m in ROWS]
        sections.append(f'## {engine}\n\n' + as_table(['method', *PLAIN], rows))
    notes = '\n'.join(f'{i}. {text}' for i, text in enumerate(sentences, 1))
    return '\n'.join([ABOUT, *sections, *([f'## {NOTES}\n\n{notes}\n'] if notes else [])])


def test_the_table_in_the_docs_has_every_cell(workshop):
    if MATRIX in ('write', 'new'):
        if MISSING: pytest.fail('the table has a column of OpenVINO: install it, or run this where it is')
        def outcome(family, method, engine):
            if MATRIX == 'new' and (engine, method, family) in RECORDED: return RECORDED[engine, method, family]
            return workshop.outcome(family, method, engine)
        TABLE.write_text(table_of(outcome), encoding='utf-8')
        return
    assert TABLE.read_text(encoding='utf-8') == table_of(lambda family, method, engine: RECORDED[engine, method, family])
