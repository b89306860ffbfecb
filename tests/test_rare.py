"""Input and places that are rare and legitimate: each of these once ended in a wrong model, a lost file or an error that named nothing."""
import json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path
import nbformat, pytest, torch
from safetensors.torch import load_file, save_file
from codegpt_nbc import compress
from codegpt_nbc.core import paths, record
from codegpt_nbc.core.ledger import Ledger
from codegpt_nbc.core.paths import BASE_MODEL, code_of, digest, runs_dir, write_json
from codegpt_nbc.data.tokenizer import load_tokenizer, save_tokenizer
from codegpt_nbc.evidence.evaluate import size_of, weight_files, zip_bytes
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.methods.quantize import in_precision
from codegpt_nbc.model.folder import load_model, read_tensors, recipe_of, save_model
from codegpt_nbc.model.layers import Shape

ROOT = Path(__file__).resolve().parent.parent


def tiny(folder, seed=0, **other) -> Path: # `other`: fields of `Shape`
    tok = load_tokenizer()
    save_model(Decoder(replace(Shape(tok.get_vocab_size(), 512, 32, 16, (2,), (64,)), **other)).init_weights(seed), folder)
    save_tokenizer(tok, folder)
    return folder


def pickled(folder: Path) -> Path:
    torch.save(load_file(folder/'model.safetensors'), folder/'pytorch_model.bin')
    (folder/'model.safetensors').unlink()
    return folder


def changed(folder: Path, **own):
    "Entries of config.json."
    write_json(folder/'config.json', json.loads((folder/'config.json').read_text(encoding='utf-8')) | own)


def test_models_that_differ_in_any_file_have_different_names(tmp_path):
    a, b = (pickled(tiny(tmp_path/str(i), i)) for i in range(2))
    names = {digest(a), digest(b)}
    changed(a, n_positions=256)
    assert len(names | {digest(a)}) == 3


def test_weights_in_the_publishers_own_layout_are_not_read(tmp_path):
    folder = tiny(tmp_path/'m')
    want, size = read_tensors(folder), size_of(folder)
    (folder/'model.safetensors').rename(folder/'model-00001-of-00001.safetensors')
    write_json(folder/'model.safetensors.index.json', {'weight_map': dict.fromkeys(want, 'model-00001-of-00001.safetensors')})
    save_file({'layers.0.attention.wq.weight': torch.zeros(2, 2)}, folder/'consolidated.safetensors')
    assert read_tensors(folder).keys() == want.keys() and size_of(folder).raw_bytes == size.raw_bytes
    assert [p.name for p in weight_files(folder)] == ['model-00001-of-00001.safetensors']
    (folder/'model-00001-of-00001.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='lacks model-00001-of-00001.safetensors, which its index names'): read_tensors(folder)


def test_an_entry_of_null_is_as_good_as_none(tmp_path):
    folder = tiny(tmp_path/'m')
    changed(folder, quantization_config=None, tie_word_embeddings=None)
    assert load_model(folder).shape.tied


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path/'config.json').write_text('{}', encoding='utf-16')
    with pytest.raises(ValueError, match='config.json is not valid JSON'): paths.read_json(tmp_path/'config.json')


def test_files_from_before_1980_are_zipped(tmp_path):
    folder = tiny(tmp_path/'m')
    os.utime(folder/'model.safetensors', (1, 1))   # as Nix and Guix leave them
    assert zip_bytes(weight_files(folder)) > 0


def test_a_folder_here_goes_before_a_run_of_its_name(tmp_path, monkeypatch):
    from codegpt_nbc import load
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path/'home'/'build'/'try'/'small', 1)
    assert load('small').folder == tmp_path/'home'/'build'/'try'/'small'
    tiny(tmp_path/'small')
    assert load('small').folder == tmp_path/'small'


def test_a_ledger_that_cannot_be_written_is_named(tmp_path):
    ledger = Ledger(tmp_path/'figures.sqlite')
    ledger.path.unlink()
    ledger.path.mkdir()
    with pytest.raises(OSError, match='figures.sqlite cannot be used'): ledger.put('a', 1)


def test_results_name_no_strangers_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(record, 'PACKAGE', tmp_path/'site-packages'/'codegpt_nbc')
    for command in (['init', '-q'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-q', '--allow-empty', '-m', 'a']):
        subprocess.run(['git', *command], cwd=tmp_path, check=True)
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path))
    assert record.provenance(0, 0.).git_commit is None


def test_a_users_own_snakefile_is_not_run(tmp_path, monkeypatch):
    from codegpt_nbc.runs.grid import snakemake_command
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path))
    (tmp_path/'Snakefile').write_text('rule all: shell: "false"', encoding='utf-8')
    assert str(tmp_path/'Snakefile') not in snakemake_command('smoke', 1)


def test_an_id_that_names_no_sweep_is_one_sentence(tmp_path, monkeypatch):
    from codegpt_nbc.runs.grid import Profile, expand
    with pytest.raises(ValueError, match="block 'a-{b}' sweeps over no 'b'"):
        expand(Profile(about='a', runs=[dict(method='baseline', id='a-{b}')]), 'p')


def test_a_notebook_that_cannot_be_written_is_as_it_was(tmp_path):
    import nbformat
    path, size = tmp_path/'a.ipynb', 100_000
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f'# {"x"*size}\n1')]), path)
    before = path.read_bytes()
    code = f'''import resource, signal
from codegpt_nbc.runs.notebooks import execute
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size//2}, {size//2}))
execute({str(path)!r})'''
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert p.returncode and 'File too large' in p.stderr, p.stderr[-500:]
    assert path.read_bytes() == before


def short_files(folder: Path) -> Path:
    for project in 'abcdefgh':
        (folder/project).mkdir(parents=True)
        for i in range(12):
            lines = [f'def {project}{i}_{j}(x):\n    y = x + {j}\n    return y*{i}\n' for j in range(8)]
            (folder/project/f'm{i}.py').write_text('\n'.join(lines), encoding='utf-8')
    return folder


@pytest.mark.usefixtures('home')
def test_code_of_short_files_is_timed_with_what_there_is(tmp_path):
    from codegpt_nbc.data.inputs import resolve_data
    from codegpt_nbc.runs.steps import before_after
    a, b = (tiny(tmp_path/str(i), i) for i in range(2))
    table = before_after(a, b, n=4, rounds=1, completions=1, data=resolve_data(str(short_files(tmp_path/'code')), a))
    assert (table.loc['ms a completion'] > 0).all()


@pytest.mark.usefixtures('home')
def test_a_search_on_few_files_has_some_left_to_judge_by(tmp_path):
    from codegpt_nbc.runs.budget import BudgetConfig, Search
    c = BudgetConfig(run_id='r', model=str(tiny(tmp_path/'m')), data=str(short_files(tmp_path/'code')))
    c.check()
    v = Search(c).vocabulary
    assert len(v.texts) > 3*len(v.held)/2 > 0 and v.loss(v.model.shape.vocab//2) >= 0


def test_a_search_is_handed_over_before_its_notebook_is_made(tmp_path, monkeypatch):
    from codegpt_nbc.runs import budget
    order = []
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path))
    monkeypatch.setattr(budget, 'run', lambda s: type('Outcome', (), {'best': None}))
    monkeypatch.setattr(budget, 'missed', lambda *_: '')
    monkeypatch.setattr(budget, 'hand_over', lambda *_, **__: order.append('model'))
    monkeypatch.setattr(budget, 'template_of', str)
    monkeypatch.setattr(budget, 'run_notebook', lambda *_, **__: order.append('notebook'))
    budget.run_budget(str(tiny(tmp_path/'m')), 'mb=1')
    assert order == ['model', 'notebook']


def test_two_runs_on_other_code_are_not_compared():
    from codegpt_nbc.report.frame import frame, versus
    fr = frame('gain')
    assert versus(fr, 'onnx-dense-int8', 'baseline')
    own = fr.copy()
    result = own.result['onnx-dense-int8']
    own.at['onnx-dense-int8', 'result'] = result.model_copy(update={'config': result.config | {'data': 'elsewhere'}})
    assert versus(own, 'onnx-dense-int8', 'baseline') is None


@pytest.mark.parametrize('given', ['int8', {'quant_method': 'gptq'}, {'quant_method': ['gptq']}])
def test_a_foreign_quantisation_is_refused_before_its_weights_are_read(tmp_path, given):
    folder = tiny(tmp_path/'m')
    changed(folder, quantization_config=given)
    (folder/'model.safetensors').unlink()
    with pytest.raises(ValueError, match="m is quantised by .*(int8|gptq)'.*, which is not supported: use one of"): load_model(folder)


@pytest.mark.parametrize('lineage', ['[]', '{}', '{"chain": "prune"}', '{"chain": [1]}'])
def test_a_foreign_recipe_json_is_named(tmp_path, lineage):
    folder = tiny(tmp_path/'m')
    (folder/'recipe.json').write_text(lineage)
    with pytest.raises(ValueError, match='recipe.json'): recipe_of(folder)


def test_a_list_where_an_object_belongs_is_named(tmp_path):
    from codegpt_nbc.data.raw_text import stated_ids
    (tmp_path/'generation_config.json').write_text('[1, 2]')
    with pytest.raises(ValueError, match='generation_config.json is not a JSON object: restore it'): stated_ids(tmp_path, 'eos_token_id')


@pytest.mark.parametrize('name', ['full\n', 'full/..', '.full', ''])
def test_what_cannot_name_a_profile(name):
    with pytest.raises(ValueError, match='cannot name a profile'): runs_dir(name)


@pytest.mark.parametrize('step', [
    {'method': 'prune', 'pattern': 'structured'}, {'method': 'prune', 'pattern': 'unstructured'}, {'method': 'distill', 'layers': 1},
    {'method': 'reshape', 'heads': [1], 'neurons': [32], 'channels': 16}, {'method': 'mixed', 'bits': {'blocks.0.mlp.up': '8'}}])
def test_a_quantised_model_is_not_trained(tmp_path, step, monkeypatch):
    from codegpt_nbc.runs.steps import make_step, step_config
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path/'home'))
    folder = tiny(tmp_path/'m')
    small = save_model(in_precision(load_model(folder), 'int8'), tmp_path/'small', folder)
    c = step_config(step, small, {})
    with pytest.raises(ValueError, match='small is quantised: .* the float model that it was made from.'): make_step(c, step['method'])
    assert not c.out_folder.exists()


def test_a_parameter_of_another_type_is_an_error_not_the_default():
    from codegpt_nbc.data.inputs import RunConfig
    for own, name in ((dict(model=Path('nowhere')), 'model'), (dict(seed=b'seven'), 'seed')):
        with pytest.raises(ValueError, match=f'parameter {name!r} of RunConfig'): RunConfig.from_cell(dict(run_id='a', Path=Path) | own)


def test_what_other_code_made_is_made_again(tmp_path, monkeypatch):
    from codegpt_nbc.runs import steps
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path))
    step = {'method': 'quantize'}
    own = steps.step_config(step, paths.BASE_MODEL, {}).out_folder
    assert own == steps.step_config(step, paths.BASE_MODEL, {}).out_folder
    assert len({code_of('core'), code_of('model'), code_of('core/paths')}) == 3
    monkeypatch.setattr(steps, 'code_of', lambda *wings: 'another')
    assert steps.step_config(step, paths.BASE_MODEL, {}).out_folder != own


def test_a_version_in_a_name_makes_no_step_of_a_run():
    from codegpt_nbc.runs.grid import Profile, Recipe, expand
    blocks = [dict(method='baseline', id='qwen2.5-coder'), dict(recipe='two', id='half2.1-int8', set={'model': 'qwen2.5-coder'}),
              dict(method='measure', id='m-{target}', of='models')]
    two = Recipe(about='', steps=[dict(method='prune'), dict(method='onnx')])
    made = expand(Profile(about='', runs=blocks), 'p', {'two': two})
    assert [i for i, r in made.items() if r.step] == ['half2.1-int8.1-prune']
    assert [i for i in made if i.startswith('m-')] == ['m-qwen2.5-coder', 'm-half2.1-int8']


def test_a_kernel_that_dies_is_named_and_its_notebook_kept(tmp_path, monkeypatch):
    from codegpt_nbc.runs.grid import RunFailed, run_notebook
    from codegpt_nbc.runs.notebooks import execute
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path))
    dies = [nbformat.v4.new_code_cell('seed = 1', metadata={'tags': ['parameters']}),
            nbformat.v4.new_code_cell('import os, signal\nos.kill(os.getpid(), signal.SIGKILL)')]
    nb = nbformat.v4.new_notebook(cells=dies, metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    nbformat.write(nb, tmp_path/'dies.ipynb')
    with pytest.raises(RunFailed, match=r'^mine failed: its kernel died, .*mine\.failed\.ipynb'):
        run_notebook(tmp_path/'dies.ipynb', tmp_path/'mine.ipynb', {}, bar=False)
    assert len(nbformat.read(tmp_path/'build'/'try'/'mine.failed.ipynb', 4).cells) >= 2 and not (tmp_path/'mine.ipynb').exists()
    with pytest.raises(RuntimeError, match='^dies.ipynb failed: its kernel died'): execute(tmp_path/'dies.ipynb')


def test_a_lock_is_free_after_its_block(tmp_path, monkeypatch):
    import filelock
    from codegpt_nbc.core.paths import waiting_lock
    from codegpt_nbc.runs.grid import _only_grid
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path))
    held, acquire = [], filelock.FileLock.acquire
    monkeypatch.setattr(filelock.FileLock, 'acquire', lambda self, *a, **k: (held.append(self), acquire(self, *a, **k))[1])
    for block in (waiting_lock(tmp_path/'a.lock', 'held'), _only_grid()):
        with block: assert held[-1].is_locked
        assert not held[-1].is_locked


def test_budgets_of_no_method_are_refused(tmp_path):
    bad = (({'distil': {'tokens': 1000}}, "there is no method 'distil'"), ({'onnx': 5}, 'give the parameters of each method'))
    for budgets, said in bad:
        with pytest.raises(ValueError, match=said): compress('codegpt-nano', 'int8', tmp_path/'out', budgets=budgets, progress=False)


def test_a_path_with_a_colon_is_a_file(tmp_path, monkeypatch):
    import ntpath
    from codegpt_nbc.runs import cli
    monkeypatch.chdir(tmp_path)
    Path('a:b.py').write_text('x = 1\n', encoding='utf-8')
    assert cli._names_file('a:b.py')
    monkeypatch.setattr(cli.os.path, 'splitdrive', ntpath.splitdrive)
    with pytest.raises(ValueError, match=r'C:\\proj\\a\.py:12 names no place in C:\\proj\\a\.py'): cli._names_file(r'C:\proj\a.py:12')


def test_a_template_is_found_in_the_package(tmp_path, monkeypatch):
    from codegpt_nbc.runs import cli, grid
    asked = []
    monkeypatch.setattr(grid, 'run_notebook', lambda template, *args, **how: asked.append(template))
    monkeypatch.chdir(tmp_path)
    cli.run(Path('nbs/experiments/prune.ipynb'), tmp_path/'out.ipynb', bar=False)
    assert asked[0].is_file()


def test_a_grid_on_windows_is_refused_in_a_sentence(monkeypatch):
    from codegpt_nbc.runs.grid import reproduce
    monkeypatch.setattr(sys, 'platform', 'win32')
    with pytest.raises(OSError, match='on Windows, call this within WSL'): reproduce('quick')


def test_limits_that_are_met_are_exceeded_by_nothing():
    from codegpt_nbc.runs.budget import excess
    assert excess({'ms': 5., 'mb': 9.}, {'ms': 10.}) == excess({'ms': 5.}, {}) == 0. < excess({'ms': 12.}, {'ms': 10.}) < .2


def test_a_figure_that_failed_is_not_counted(tmp_path):
    ledger = Ledger(tmp_path/'figures.sqlite')
    with pytest.raises(ZeroDivisionError): ledger.known('a', lambda: 1/0)
    assert ledger.measured == len(ledger) == 0


def test_a_session_remembers_the_work_of_its_last_prompts_only():
    from codegpt_nbc.engines.generate import open_engine
    from codegpt_nbc.engines.session import Prefixes
    engine, _ = open_engine(BASE_MODEL, threads=1)
    prefixes = Prefixes(engine, 2**24)
    prefixes.works.extend([None]*1000)
    assert len(prefixes.works) < 100


def test_a_path_on_another_drive_is_shown_as_it_is(monkeypatch):
    import ntpath
    from codegpt_nbc.core import paths
    monkeypatch.setattr(paths.os.path, 'relpath', ntpath.relpath)
    assert paths.from_here(r'C:\a\b', 'D:\\') == r'C:\a\b'


FOUR = Shape(vocab=300, context=64, d_model=16, d_head=8, heads=(2,)*4, inner=(32,)*4)


@pytest.mark.parametrize('kept, want', [([0, 1], [0, 1, 4]), ([0, 3], [0, 1, 4]), ([1, 3], [0, 2, 4])])
def test_a_student_layer_learns_from_the_layer_that_it_copies(kept, want):
    from codegpt_nbc.methods.xtc import Watched, XtcLoss
    from codegpt_nbc.model.decoder import with_layers
    teacher = Decoder(FOUR).init_weights(0)
    pair = Watched(with_layers(teacher, kept), Decoder(FOUR).init_weights(0), XtcLoss(), kept)
    assert pair.match == want
    pair(torch.randint(300, (2, 9)), torch.randint(300, (2, 9)))
    if kept[0] == 0:   # the first layer reads and is what its teacher's is
        q, k = torch.randn(2, 2, 2, 9, 8)
        assert pair.attention_loss({0: (q, k)}, {0: (q, k)}, torch.ones(2, 9, dtype=torch.bool)) < 1e-9


def test_the_layers_kept_are_the_ones_that_are_matched(home, monkeypatch):
    from codegpt_nbc.methods import xtc
    folder, asked = tiny(home/'m', heads=(2,)*4, inner=(64,)*4), {}
    monkeypatch.setattr(xtc, 'Watched', lambda student, teacher, loss, copied: asked.update(copied=copied) or 1/0)
    for layers, want in ((.5, [0, 3]), ([0, 1], [0, 1]), (None, [0, 1, 2, 3])):
        c = xtc.XtcConfig(run_id='x', model=str(folder), teacher=str(folder), layers=layers, tokens=256, length=32, validation=4)
        with pytest.raises(ZeroDivisionError): xtc.xtc_step(c)
        assert asked['copied'] == want


def test_states_of_a_teacher_are_kept_where_one_says(home):
    from codegpt_nbc.methods.distill import DistillConfig, distill
    c = DistillConfig(run_id='x', student='model', epochs=2, tokens=256, length=32, batch=2)
    rows = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(0)).tolist()
    def taught_by(seed, states=None):
        student = Decoder(FOUR).init_weights(0)
        distill(student, Decoder(FOUR).init_weights(seed), rows, c, states=states)
        return student.tokens.weight
    plain = taught_by(1)
    assert not list(home.rglob('*.npy')) and not torch.equal(taught_by(2), plain)
    torch.testing.assert_close(taught_by(1, home/'states.npy'), plain, atol=1e-3, rtol=0)   # they are stored in half precision
    assert (home/'states.npy').is_file()


def test_lines_of_raw_source_are_counted():
    from codegpt_nbc.methods.vocabulary import count_tokens, rank_tokens, trimming_table
    tok, texts = load_tokenizer(), ['a = 1\nb = 2\nc = 3', 'd = 4']
    ranking = rank_tokens(tok, count_tokens(tok, texts))
    def per_line(text): return trimming_table(tok, ranking, texts, [1000], FOUR, text)['tokens a line'].iloc[0]
    assert per_line('raw') == pytest.approx(per_line('codexglue')/2)


@pytest.mark.parametrize('momentum', [None, 0., .9])
def test_ranges_do_not_depend_on_how_attention_is_split(momentum, monkeypatch):
    from codegpt_nbc.methods import static_quantize
    from codegpt_nbc.methods.ranges import Calibrated
    model, g = Decoder(FOUR).init_weights(0), torch.Generator().manual_seed(0)
    batches = [torch.randint(300, (4, 16), generator=g) for _ in range(3)]
    found = []
    for scores in (2**21, 1):
        monkeypatch.setattr(static_quantize, 'SCORES', scores)
        found.append(static_quantize.calibrate(model, batches, Calibrated(momentum=momentum)))
    for name in found[0]: torch.testing.assert_close(found[0][name], found[1][name], msg=name)


def test_gptq_refuses_three_values_and_takes_bfloat16():
    from codegpt_nbc.methods.gptq import gptq
    from codegpt_nbc.methods.space import scheme_of
    model, ids = Decoder(FOUR).init_weights(0).bfloat16(), torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match='GPTQ cannot round blocks.* to three values'): gptq(model, ids, scheme_of('ternary', 'blocks.*'))
    mine, same = (gptq(m, ids, scheme_of('4-32', 'blocks.*')) for m in (model, Decoder(FOUR).init_weights(0).bfloat16().float()))
    for (name, a), b in zip(mine.state_dict().items(), same.state_dict().values()): assert torch.equal(a, b), name


def test_a_model_of_another_toolkit_is_not_taken_for_floats():
    from codegpt_nbc.methods.itrex import ToolkitDecoder
    from codegpt_nbc.methods.vocabulary import with_tokens
    theirs = ToolkitDecoder(FOUR)
    for use in (lambda: in_precision(theirs, 'fp32'), lambda: with_tokens(theirs, [*range(100)])):
        with pytest.raises(ValueError, match="another toolkit's: give the float model"): use()


@pytest.mark.parametrize('own, said', [({'width': 100}, 'not divisible by 8 heads'), ({'heads': 0}, 'heads'), ({'width': 0}, 'width')])
def test_a_model_whose_heads_do_not_fit_is_refused_before_its_training(own, said):
    from codegpt_nbc.model.pretrain import PretrainConfig
    with pytest.raises(ValueError, match=said): PretrainConfig(run_id='x', stages=[dict(layers=1, length=8, batch=1, steps=1)], **own)


def test_no_difference_has_no_sign():
    from codegpt_nbc.evidence.metrics import paired
    assert str(paired([1.], [1.], most=0.)['ci']) == '[0.0, 0.0]'


@pytest.mark.parametrize('package, said', [
    ('typing_extensions', 'is a single module'), ('no_such_package', 'there is no package'), ('a.b', 'there is no package')])
def test_code_of_a_module_is_not_called_missing(package, said):
    from codegpt_nbc.data.repository import installed_folder
    with pytest.raises(ValueError, match=said): installed_folder(package)


def test_headers_are_read_without_a_word(recwarn):
    from codegpt_nbc.data.corpus import header_license
    assert header_license('"""Under the GPL, version 3."""\nx = "\\d"\n') == 'GPL-3.0' and not recwarn.list


def test_the_token_that_fills_rows_is_carried_on(tmp_path):
    from codegpt_nbc.model.folder import special_ids
    save_tokenizer(load_tokenizer(), tmp_path)
    write_json(tmp_path/'tokenizer_config.json', {'bos_token': '<s>', 'pad_token': '<pad>'})
    tok = load_tokenizer()
    assert special_ids(tmp_path) == {'bos_token_id': tok.token_to_id('<s>'), 'pad_token_id': tok.token_to_id('<pad>')}


@pytest.mark.parametrize('model, name', [
    ('owner/name@main', 'owner/name'), ('models/big.Q4_K.gguf', 'big.Q4_K'), ('codegpt-nano', ''), ('.', '')])
def test_clients_ask_for_a_model_by_its_name(model, name):
    from codegpt_nbc.runs.serve import asked_as
    assert asked_as(model) == name


def test_a_candidate_whose_folder_is_gone_is_judged_again(home, monkeypatch):
    from codegpt_nbc.runs import search
    model, judged = tiny(home/'m'), []
    def judge(name, *_):
        folder = home/f'made-{len(judged)}'
        folder.mkdir()
        judged.append(name)
        return dict(recipe=name, es=1., mb=1., ratio=1., folder=str(folder))
    monkeypatch.setattr(search, '_judged', judge)
    rung = search.Rung(samples=1, rounds=1, slack=0., budgets={})
    def climb(): return search._climb(rung, ['dense'], 0, 1, 'search', {}, model, 16, '', 0, None)[0].folder
    first = climb()
    assert climb() == first and len(judged) == 1
    Path(first).rmdir()
    assert Path(climb()).is_dir() and len(judged) == 2
