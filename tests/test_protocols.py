"""Protocols: what a cut keeps, the frozen places and files, repositories, and models of raw source in every method."""
import io, tokenize, numpy as np, pandas as pd, pytest
from hashlib import blake2b
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from codegpt_nbc.core.paths import BASE_MODEL, CORPUS, read_json, verify_checksums, write_json
from codegpt_nbc.data.codexglue import imported
from codegpt_nbc.data.corpus import drop_leaks, drop_near_duplicates, is_permissive
from codegpt_nbc.data.inputs import RunConfig, resolve_data
from codegpt_nbc.data.repository import FEWEST, imported_repository, is_repository, repository_files, repository_sides, side_of
from codegpt_nbc.data.samples import FORMS, PROTOCOLS, draw_places, has_text, load_samples, load_texts, protocols_of
from codegpt_nbc.data.text_format import Literals, abstract, spell_out
from codegpt_nbc.evidence.measure import MeasureConfig
from codegpt_nbc.evidence.evaluate import evaluate
from codegpt_nbc.evidence.metrics import COMPARISONS, score
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.folder import save_model
from codegpt_nbc.model.layers import Shape
from codegpt_nbc.runs.api import evaluate as evaluate_model
from codegpt_nbc.runs.steps import make_step, step_config
from codegpt_nbc.report.publish import ReportConfig

RAW = CORPUS/'raw'
KEPT = Literals(*(frozenset(read_json(CORPUS/'literals.json')[kind]) for kind in ('str', 'num')))
LINES = ['import os', '', '# a comment', 'x = 1', 'y = f(x)  # why', 'if x: pass', 'def f(): return "é"', "z = f'{x!r:>{y}}' + 'é\\t'",
         'x = [1,\n    2]',
         "b = '''\nlong\n'''; c = 0", 'def g(x, *, y=1):\n    """Say.\n\n    more"""\n\treturn x @ y'.replace('\t', '    '), '  ']


@st.composite
def sources(draw):
    "Python with all that a cut must get past."
    lines = draw(st.lists(st.sampled_from(LINES), max_size=12))
    head = draw(st.sampled_from(['', '# -*- coding: utf-8 -*-\n', '"""About.\n\nMore.\n"""\n', '\n\n']))
    return head + '\n'.join(lines) + draw(st.sampled_from(['', '\n', '\n\n']))


def tokens_of(text: str) -> set: # offsets
    "Where Python's own tokenizer starts a token that is none of layout or comment; pieces of an f-string are left out."
    starts, out, depth = np.cumsum([0] + [len(line) + 1 for line in text.split('\n')]), set(), 0
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[t.type]
        if not depth and name in ('NAME', 'NUMBER', 'STRING', 'OP', 'FSTRING_START'): out.add(int(starts[t.start[0] - 1] + t.start[1]))
        depth += (name == 'FSTRING_START') - (name == 'FSTRING_END')
    return out


@settings(max_examples=200, deadline=None)
@given(sources(), st.sampled_from(protocols_of('raw')))
def test_a_raw_cut_keeps_every_character_and_asks_for_one_line(text, protocol):
    tokens, asked = tokens_of(text), set()
    for start, end in PROTOCOLS[protocol].places(text):
        sample = FORMS['raw'].sample(text, start, end)
        assert sample['input'] + sample['gt'] + sample['suffix'] == text
        assert sample['gt'].strip() and '\n' not in sample['gt'] and not sample['gt'].lstrip().startswith('#')
        assert sample['suffix'][:1] in ('', '\n') and sample['input'].strip()
        if protocol == 'infill': assert sample['input'].endswith('\n') and sample['suffix'].strip()
        asked.add(int(start))
    if protocol == 'line': assert asked == tokens - {min(tokens, default=0)}


@settings(max_examples=100, deadline=None)
@given(sources(), st.sampled_from(protocols_of('codexglue')))
def test_a_spelled_cut_keeps_every_word(text, protocol):
    spelled = abstract(spell_out(text), KEPT)
    for start, end in PROTOCOLS[protocol].places(spelled):
        sample = FORMS['codexglue'].sample(spelled, start, end)
        assert spelled.startswith(f"{sample['input']} {sample['gt']} ") and '<EOL>' not in sample['gt'].split()


def test_a_place_is_drawn_once_and_projects_share():
    text = 'x = 1\ny = f(x)\nz = y\nprint(z)\n'
    files = pd.DataFrame({'project': ['a']*8 + ['b']*2, 'path': [f'{i}.py' for i in range(10)], 'text': text})
    for protocol in protocols_of('raw'):
        every = sum(len(PROTOCOLS[protocol].places(text)) for text in files.text)
        assert every
        drawn = draw_places(files, protocol, every, per_project=1.)
        assert len(drawn.drop_duplicates()) == every
        with pytest.raises(ValueError, match=f'only {every} of {every + 1} samples of {protocol}'):
            draw_places(files, protocol, every + 1, per_project=1.)
    assert draw_places(files, 'line', 10, per_project=.3).file.isin([8, 9]).sum() >= 2


# The frozen part
@pytest.mark.parametrize('split, n, share', [('test', 2000, .1), ('valid', 1000, .2)])
@pytest.mark.parametrize('protocol', protocols_of('raw'))
def test_frozen_places_are_drawn_again(split, n, share, protocol):
    files, frozen = pd.read_parquet(RAW/f'{split}.parquet'), pd.read_parquet(RAW/f'{split}_{protocol}.parquet')
    assert len(frozen) == n == read_json(RAW/'summary.json')['rows'][f'{split}_{protocol}']
    assert frozen.equals(draw_places(files, protocol, n, per_project=share))
    samples = load_samples(protocol, split=split)
    of = files.iloc[frozen.file].reset_index(drop=True)
    assert (samples.input + samples['gt'] + samples.suffix == of.text).all() and (samples.path == of.path).all()
    assert load_samples(protocol, 5, split).equals(samples.head(5))


def test_frozen_files_are_those_of_the_manifest_and_may_be_shipped():
    verify_checksums(RAW)
    manifest, most = pd.read_csv(CORPUS/'manifest.csv', dtype=str), read_json(RAW/'summary.json')['characters_at_most']
    known = set(manifest.itertuples(index=False, name=None))
    for split in ('train', 'valid', 'test'):
        files = pd.read_parquet(RAW/f'{split}.parquet')
        rows = files.assign(split=split)[list(manifest.columns)]
        own = files.license.map(is_permissive) | (files.path == 'jupyter_client/ssh/forward.py')   # under the LGPL, named as such
        assert set(rows.itertuples(index=False, name=None)) <= known and own.all()
        assert files.text.str.len().max() <= most[split] and not files.text.str.contains('\r').any()
    assert sum(p.stat().st_size for p in RAW.iterdir()) < 4_200_000


def test_frozen_raw_files_spell_out_to_the_corpus():
    spelled = pd.read_parquet(CORPUS/'train.parquet').set_index(['project', 'path']).text
    files = pd.read_parquet(RAW/'train.parquet').head(60)
    assert all(abstract(spell_out(f.text), KEPT) == spelled[f.project, f.path] for f in files.itertuples())
    assert [f.text for f in files.itertuples()] == load_texts(n=60, text='raw')


FIRST_500 = '925b39098488d73740efcec1f5b4ea0e'   # of the validation samples that the corpus was frozen with


def test_more_validation_samples_leave_the_first_as_they_were():
    samples = load_samples(split='valid')
    rows = samples.head(500).itertuples(index=False, name=None)
    assert blake2b('\n'.join(map('\t'.join, rows)).encode(), digest_size=16).hexdigest() == FIRST_500
    assert len(samples) == 1000 == read_json(CORPUS/'summary.json')['rows']['valid_codexglue']
    assert not samples.duplicated(['input', 'gt']).any()
    for n in (1, 16, 500): assert load_samples('codexglue', n, 'valid').equals(samples.head(n))
    for n in (16, 100): assert RunConfig(run_id='r', profile='p').validation_prompts(n) == samples.input.head(n).tolist()


def test_validation_samples_are_of_files_that_nothing_else_uses():
    verify_checksums(CORPUS)
    manifest, samples = pd.read_csv(CORPUS/'manifest.csv', dtype=str), load_samples(split='valid')
    files = set(zip(samples.project, samples.path))
    rows = manifest[[at in files for at in zip(manifest.project, manifest.path)]]
    assert len(rows) == len(files) and set(rows.split) == {'valid'} and rows.license.map(is_permissive).all()
    others = pd.concat([manifest[manifest.split != 'valid'], *(load_samples(p) for p in PROTOCOLS)])
    assert not files & set(zip(others.project, others.path)) and not set(samples.project) & set(others.project)
    train = pd.read_parquet(CORPUS/'train.parquet').assign(split='train')
    held = samples.assign(text=samples.input + ' ' + samples['gt'], split='valid')
    both = pd.concat([train, held], ignore_index=True)[['project', 'path', 'text', 'split']]
    assert len(drop_near_duplicates(drop_leaks(both))) == len(both)


def test_both_texts_hold_out_the_same_projects():
    def projects(frames): return {p for f in frames for p in f.project}
    def frozen(split): return [p for p, about in PROTOCOLS.items() if (CORPUS/FORMS[about.text].folder/f'{split}_{p}.parquet').is_file()]
    held = {split: projects([load_samples(p, split=split) for p in frozen(split)]) for split in ('test', 'valid')}
    trained = projects([pd.read_parquet(CORPUS/form.folder/'train.parquet') for form in FORMS.values()])
    assert not held['test'] & held['valid'] and not (held['test'] | held['valid']) & trained


# Comparing
@pytest.mark.parametrize('text, pred, gt, em, es', [
    ('raw', 'x = 1  ', 'x = 1', 1, 100), ('raw', 'x  = 1', 'x = 1', 0, 91), ('raw', '', '', 1, 100), ('raw', '<NUM_LIT>', '0', 0, 0),
    ('codexglue', 'x  = <NUM_LIT>', 'x = 0', 1, 91), ('codexglue', ' x', 'x', 1, 100)])
def test_an_answer_is_compared_in_its_text(text, pred, gt, em, es):
    s = score([pred], [gt], text).iloc[0]
    assert (s.em, s.es) == (em, es) and COMPARISONS.keys() == FORMS.keys()


# Repositories
def source(i: int) -> str:
    names = ' '.join(f'{word}_{i}' for word in ('read', 'path', 'rows', 'total', 'scale', 'limit')).split()
    read, path, rows, total, scale, limit = names
    return (f'import m{i}\n\n\ndef {read}({path}, {scale}={i}):\n    """Read {path}."""\n    {rows} = m{i}.load({path}, "rb")\n'
            f'    {total} = sum({rows}) + {i}\n    if {total} > {limit}:\n        {total} = m{i}.cut({total}, {limit})  # so\n'
            f'    return {total}*{scale}\n')


def write(home, n: int):
    for i in range(n):
        (home/f'p{i % 3}').mkdir(parents=True, exist_ok=True)
        (home/f'p{i % 3}'/f'f{i}.py').write_text(source(i), encoding='utf-8')
    return home


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path))
    return tmp_path


def files_of(folder) -> dict: # split → paths
    held = {split: {p for name in PROTOCOLS for p in load_samples(name, split=split, folder=folder).path} for split in ('valid', 'test')}
    return held | {'train': {p for form in FORMS.values() for p in pd.read_parquet(folder/form.folder/'train.parquet').path}}


def test_a_repository_is_split_by_what_its_files_say(home):
    mine = write(home/'mine', 40)
    made = resolve_data(str(mine))
    first = files_of(made)
    assert not first['train'] & (first['valid'] | first['test']) and not first['valid'] & first['test']
    assert len(first['train']) > 10 and len(first['test']) > 8
    other = write(home/'other', 40)                                        # elsewhere, with files added, and one renamed
    (other/'p0'/'f0.py').rename(other/'p0'/'renamed.py')
    for i in range(60, 70): (other/'p1'/f'f{i}.py').write_text(source(i), encoding='utf-8')
    again = files_of(resolve_data(str(other)))
    side = {path: split for split, paths in again.items() for path in paths}
    assert all(side[path] == split for split, paths in first.items() for path in paths if path != 'p0/f0.py')
    assert side['p0/renamed.py'] == side_of(spell_out(source(0)))
    assert resolve_data(str(mine)) == made and has_text(made, 'raw') and has_text(made, 'codexglue')


def test_near_copies_are_not_trained_on(home):
    mine = write(home/'mine', 30)
    held = next(p for split in ('test', 'valid') for p in sorted(files_of(imported_repository(mine))[split]))
    for i in range(30): (mine/f'copy{i}.py').write_text((mine/held).read_text(encoding='utf-8') + f'\nchanged = {i}\n', encoding='utf-8')
    sides, skipped = repository_sides(mine)
    assert skipped['repeats a held-out file'] > 5
    assert not sides.path[(sides.split == 'train') & sides.path.str.startswith('copy')].any()


def test_what_is_no_part_of_a_repository_is_left_out(home):
    mine = write(home/'mine', 25)
    for name in ('.git/hook.py', 'env/lib/site-packages/a.py', 'node_modules/b.py', 'own/_vendor/c.py', 'tool/bin/d.py'):
        (mine/name).parent.mkdir(parents=True, exist_ok=True)
        (mine/name).write_text(source(80), encoding='utf-8')
    (mine/'tool'/'pyvenv.cfg').touch()
    (mine/'data').mkdir()
    (mine/'data'/'train.txt').write_text('no code', encoding='utf-8')       # of the repository's own
    assert {f.path.split('/')[0] for f in repository_files(mine)} == {'p0', 'p1', 'p2'} and is_repository(mine)
    (mine/'data'/'train.txt').write_text('<s> x = 1 <EOL> y </s>\n', encoding='utf-8')
    assert not is_repository(mine)                                          # CodeXGLUE's layout, with scripts beside it


def sentence(call, *parts):
    with pytest.raises(ValueError) as e: call()
    said = str(e.value)
    assert all(part in said for part in parts) and '\n' not in said and said.endswith('.'), said


def test_bad_repositories_are_one_sentence(home):
    (home/'none').mkdir()
    (home/'none'/'README.md').touch()
    sentence(lambda: imported_repository(home/'none'), 'holds no Python files', 'give the folder of a repository')
    sentence(lambda: resolve_data(str(home/'none')), 'no code')
    sentence(lambda: resolve_data(str(write(home/'few', 4))), 'too few usable Python files', 'twenty or more')
    (home/'bad').mkdir()
    for i in range(30): (home/'bad'/f'{i}.py').write_text('def (', encoding='utf-8')
    sentence(lambda: resolve_data(str(home/'bad')), '(0 of 30; does not parse: 30)')
    assert not (home/'build'/'imported').exists() or not [*(home/'build'/'imported').glob('*')] and FEWEST


# Models of raw source
@pytest.fixture(scope='module')
def raw_model(tmp_path_factory):
    "Random weights, and a byte-level tokenizer without any word of CodeXGLUE's format."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ['<|end|>', '<fim_prefix>', '<fim_suffix>', '<fim_middle>']
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=marks, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator([source(i) for i in range(20)], trainer)
    folder = tmp_path_factory.mktemp('models')
    (folder/'tokenizer').mkdir()
    tok.save(str(folder/'tokenizer'/'tokenizer.json'))
    write_json(folder/'tokenizer'/'config.json', {'eos_token_id': 0})
    shape = Shape(tok.get_vocab_size(), 96, 32, 16, (2, 2), (64, 64))
    return save_model(Decoder(shape).init_weights(0), folder/'raw', parent=folder/'tokenizer')


STEPS = {
    'prune': dict(pattern='structured', sparsity=.3, samples=4, epochs=2, length=32),
    'quantize': dict(finetune_samples=4, length=32), 'gptq': dict(calibration=4, length=24, block=16),
    'static_quantize': dict(calibration_batches=1, batch=2, length=24),
    'distill': dict(student='reduced', layers=1, tokens=256, length=32, batch=2),
    'xtc': dict(bits=2, layers=1, tokens=256, length=32, batch=2),
    'trim_vocabulary': dict(size=320, files=10),
}


@pytest.mark.parametrize('data', ['', 'mine'])
@pytest.mark.parametrize('method', STEPS)
def test_every_method_works_on_raw_source(method, data, raw_model, home, monkeypatch):
    mine = str(write(home/'mine', 40)) if data else ''
    seen, theirs = [], load_texts
    monkeypatch.setattr('codegpt_nbc.data.samples.load_texts', lambda *args: seen.append(args) or theirs(*args))
    result = make_step(step_config({'method': method, **STEPS[method]}, raw_model, {}, mine), method)
    assert evaluate_model(result.folder, 2).n == 2
    assert {args[2] for args in seen} == {'raw'} and (mine == '') == (seen[0][0] == CORPUS)


def test_raw_models_are_judged_in_raw_source(raw_model, home):
    for protocol in (None, *protocols_of('raw')): assert evaluate_model(raw_model, 3, protocol).n == 3
    mine = str(write(home/'mine', 40))
    assert evaluate_model(raw_model, 3, 'infill', mine).n == 3 and evaluate_model(BASE_MODEL, 3, None, mine).n == 3


def test_the_truth_scores_full(raw_model, monkeypatch):
    "The samples reach the engine as they are, and their answers are compared with what comes back."
    def repeat(engine, tok, prompts, max_new, batch, desc, suffixes=()):
        assert len(suffixes) in (0, len(prompts))
        of = load_samples('infill' if suffixes else 'line', len(prompts))
        assert prompts == of.input.tolist() and (not suffixes or suffixes == of.suffix.tolist())
        return (of['gt'] + '  ').tolist()
    monkeypatch.setitem(evaluate.__globals__['COMPLETE'], 'raw', repeat)
    for protocol in protocols_of('raw'):
        scores, _ = evaluate(None, None, protocol, 20)
        assert scores.em.all() and (scores.es == 100).all()


def test_a_protocol_in_another_text_is_refused(raw_model, home):
    asked = dict.fromkeys(PROTOCOLS, 0)
    def config(**changed): return lambda: RunConfig(run_id='a', **asked | changed).check()
    sentence(config(line=2), 'asks in raw source', "codegpt-nano reads CodeXGLUE's words", 'choose codexglue or thesis')
    sentence(config(codexglue=2, model=str(raw_model)), "asks in CodeXGLUE's words", 'reads raw source', 'choose line or infill')
    for config_of in (MeasureConfig, ReportConfig): config_of(run_id='a', **asked | dict(line=2)).check()   # nothing is judged
    words = home/'words'
    words.mkdir()
    for p in CORPUS.glob('*.parquet'): (words/p.name).write_bytes(p.read_bytes())
    sentence(config(model=str(raw_model), data=str(words)), "holds CodeXGLUE's words", 'reads raw source', 'give a folder of Python files')
    sentence(lambda: evaluate_model(BASE_MODEL, 2, 'page'), "unknown protocol 'page'", 'codexglue, thesis, line, infill')
    sentence(lambda: evaluate_model(raw_model, 10**6), '1000000 samples asked, but line has 2000')
    assert imported(words) == words
