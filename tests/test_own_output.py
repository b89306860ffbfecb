"""What the package wrote itself must not get in its own way: caches below the data, results of other runs, models that are being read."""
import ast, errno, os
from pathlib import Path
from types import SimpleNamespace
import pytest
from test_protocols import write
from test_rare import tiny
from codegpt_nbc.core.paths import check_out, models_dir, project_root, read_json, runs_dir
from codegpt_nbc.core.record import HeldOut, provenance
from codegpt_nbc.data.hub import _reason
from codegpt_nbc.data.inputs import RunConfig, resolve_data
from codegpt_nbc.data.repository import is_repository
from codegpt_nbc.report.frame import loss_test
from codegpt_nbc.runs.grid import Recipe, _left_by_killed, _place_of, run_notebook, template_of
from codegpt_nbc.runs.search import Candidate, choose, name_of_search
from codegpt_nbc.runs.steps import SEED, apply_recipe, step_config


def test_a_cache_below_a_repository_is_not_its_code(tmp_path, monkeypatch):
    "As where one installs the package, changes into a repository, and says `--data .`: the cache lies in that very folder."
    mine = write(tmp_path/'mine', 40)
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(mine))
    monkeypatch.chdir(mine)
    first = resolve_data('.')
    assert project_root() in first.parents and is_repository(mine) and resolve_data('.') == first


def test_searches_of_two_repositories_of_one_relative_name_keep_to_themselves(tmp_path, monkeypatch):
    names = set()
    for name in ('a', 'b'):
        (tmp_path/name).mkdir()
        monkeypatch.chdir(tmp_path/name)
        names.add(name_of_search('search-size-1', None, '.'))
    assert len(names) == 2


def test_a_result_is_replaced_by_force_alone(home):
    runs_dir('try').mkdir(parents=True)
    (runs_dir('try')/'mine.json').write_text('{}')
    for out, params in (('other.ipynb', {'run_id': 'mine'}), ('mine.ipynb', {})):
        said = "the run 'mine' of the profile 'try' has a result: give another run_id; force=True replaces it"
        with pytest.raises(FileExistsError, match=said):
            run_notebook(template_of('prune'), out, params, bar=False)


def test_two_notebooks_of_one_template_have_a_result_each():
    places = [_place_of(template_of('prune'), {}, Path(f'{name}.ipynb')) for name in 'ab']
    assert places == [('try', 'a'), ('try', 'b')]


def test_what_a_living_run_writes_is_left_alone(home):
    for folder in (models_dir('p'), runs_dir('p')): folder.mkdir(parents=True)
    alive, longer = models_dir('p')/f'.tmp-a-{os.getpid()}_x1y2z3ab', models_dir('p')/'.tmp-a-b-99999999_x1y2z3ab'
    dead = models_dir('p')/'.tmp-a-99999999_x1y2z3ab', runs_dir('p')/'.tmp-a.ipynb-x1y2z3ab'
    for folder in (alive, longer, *dead): folder.mkdir()
    assert _left_by_killed('p', 'a') == []
    alive.rmdir()
    assert set(_left_by_killed('p', 'a')) == set(dead)     # of `a-b` nothing


def test_a_file_that_is_read_is_not_written(tmp_path):
    model = tmp_path/'model.gguf'
    model.write_bytes(b'GGUF')
    with pytest.raises(FileExistsError, match='is what is being read: choose another name'):
        check_out(model, sources=[tmp_path/'copy', model], force=True)


def test_a_compressed_model_is_the_folder_and_no_run_of_its_name(home, monkeypatch, tmp_path):
    from codegpt_nbc import compress
    monkeypatch.chdir(tmp_path)
    tiny(models_dir('try')/'small', 1)
    small = compress(tiny(tmp_path/'dense'), out='small', progress=False, budgets={'onnx': {'compare': 2}})
    assert RunConfig(run_id='x', model=str(small.folder)).model_folder == tmp_path/'small'


def test_losses_of_other_rows_are_not_compared():
    def run(data='', skip=200, tokens=1024, rows=2, reference='dense'):
        held = HeldOut(tokens=tokens, loss=1., loss_ci=(1., 1.), loss_each=' '.join(['1.0']*rows), kl=.1, kl_each=' '.join(['0.1']*rows),
                       reference=reference)
        return SimpleNamespace(config=dict(data=data, skip=skip), held_out=held)
    same = dict(difference=0, ci=[0, 0])
    assert loss_test(run(), run()) == loss_test(run(), run(reference='pruned')) == loss_test(run(), run(), 'kl') == same
    assert loss_test(run(), run(reference='pruned'), 'kl') is None      # divergences from two models
    for other in (run(data='mine'), run(skip=0), run(rows=4)): assert loss_test(run(), other) is None


def test_a_recipe_has_steps_and_each_a_method(home, tmp_path):
    with pytest.raises(ValueError, match='names no method'): Recipe(about='x', steps=[{'precision': 'int8'}])
    with pytest.raises(ValueError, match="the recipe 'x' has no steps: name a method"):
        apply_recipe(tiny(tmp_path/'m'), Recipe(about='x', steps=[]), tmp_path/'out', {})


def test_a_search_that_only_the_dense_model_survives_says_so():
    with pytest.raises(ValueError, match='no recipe goes on to the last rung: allow more loss'):
        choose([Candidate('dense', 60., 46., 1., 'd')], 'size', 1.)


def test_why_no_file_is_usable_is_said(tmp_path):
    for i in range(30):
        (tmp_path/f'old{i}.py').write_text('\n'.join(f'print "{i} {k}"' for k in range(12)))
    with pytest.raises(ValueError, match='too few usable Python files.*does not parse'): resolve_data(str(tmp_path))


def test_a_search_says_at_once_that_validation_samples_lack(home):
    c = RunConfig(run_id='x', data=str(write(home/'mine', 40)))
    there = c.samples_there('valid')
    c.check_valid(there)
    with pytest.raises(ValueError, match=f'has {there} validation samples, but {there + 1} judge each candidate: give more code'):
        c.check_valid(there + 1)


def test_what_trying_again_cannot_mend_is_not_tried_again():
    for code, remedy in ((errno.ENOSPC, 'make room'), (errno.EACCES, 'HF_HOME')):
        said = _reason(OSError(code, os.strerror(code)), 'main')
        assert remedy in said and 'try again' not in said
    assert 'try again' in _reason(ConnectionError(), 'main')


def test_the_seed_of_a_recipe_is_that_of_every_step_that_names_none(home, tmp_path):
    model, step = tiny(tmp_path/'m'), {'method': 'distill', 'tokens': 64, 'length': 32, 'batch': 2}
    places = {step_config(step | own, model, budget, seed=seed).out_folder
              for own, budget, seed in (({}, {}, 1), ({}, {}, 2), ({'seed': 3}, {}, 1), ({}, {'seed': 4}, 1))}
    assert len(places) == 4
    assert step_config(step, model, {}, seed=SEED).seed == step_config(step, model, {}).seed == SEED
    assert step_config(step | {'seed': 2}, model, {'seed': 4}, seed=1).seed == 2


@pytest.mark.parametrize('template', ['search', 'compress', 'budget'])
def test_templates_that_judge_a_recipe_pass_over_the_samples_that_chose_it(template):
    code = '\n'.join(''.join(c['source']) for c in read_json(template_of(template))['cells'] if c['cell_type'] == 'code')
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    named = {(c.func.id, k.arg): ast.unparse(k.value) for c in calls if isinstance(c.func, ast.Name) for k in c.keywords}
    judges = {c.func.id for c in calls if isinstance(c.func, ast.Name)} & {'before_after', 'load_samples'}
    skips = [next((ast.unparse(k.value) for k in c.keywords if k.arg == 'skip'), '') for c in calls if ast.unparse(c.func) in judges]
    assert judges and set(skips) == {'cfg.skip'}
    counts = {ast.unparse(c.args[2]) for c in calls if ast.unparse(c.func) == 'before_after'}
    assert counts == {'cfg.judged'} and 'cfg.check_judged' in {ast.unparse(c.func) for c in calls}   # of raw source, too
    makes = {c.func.id for c in calls if isinstance(c.func, ast.Name)} & {'apply_recipe', 'search'}
    assert all(named.get((call, 'seed')) == 'cfg.seed' for call in makes)


def test_no_sample_to_be_judged_by_is_one_sentence():
    with pytest.raises(ValueError, match='^codexglue is 0, but its samples judge the model: give 1 or more[.]$'):
        RunConfig(run_id='x', codexglue=0, thesis=8).check_judged()
    RunConfig(run_id='x', codexglue=1, thesis=0).check_judged()


def test_a_result_says_whether_kernels_of_ours_were_there(monkeypatch):
    for form in ('', 'AVX2'):
        monkeypatch.setattr('codegpt_nbc.core.record.attention_form', lambda: form)
        assert provenance(42, 0.).attention == form
