"""The profile `full` fits into twelve hours of two cores: the table in its comments is what its runs come to at the rates it names."""
import re
from importlib.metadata import packages_distributions
from pathlib import Path
import pandas as pd, pytest
from codegpt_nbc.core.paths import CORPUS, read_json
from codegpt_nbc.data.corpus import installed_sources, is_permissive, split_of
from codegpt_nbc.report.style import METHOD_STYLES, compressor
from codegpt_nbc.runs.grid import CORPORA, WITHOUT_MODEL, read_profile
from types import SimpleNamespace

PROFILE = Path(__file__).resolve().parent.parent/'configs'/'full.yaml'
UNIT = 1/7500          # seconds in which one core reads a token with the dense model; learning from it takes three of them
SAMPLE = .1            # seconds of a completed line; two tokens take less than half
FILE = .018            # seconds in which a source file is read, spelled out and compared with what is held out
LAYERS = 12
DENSE = SimpleNamespace(method='baseline', params={})


def group_of(run):
    if '-seed-' in run.id: return 'seeds'
    if run.id.startswith('recipe-'): return 'recipes'
    if run.method in ('measure', 'session'): return 'speed'
    if run.method in ('distill', 'pretrain'): return 'distillation'
    if run.method == 'evaluate': return 'other code'
    if run.method in ('quantize', 'static_quantize', 'gptq', 'onnx'): return 'quantisation and export'
    return {'prune': 'pruning', 'xtc': 'XTC'}.get(run.method, 'the rest')


def share(layers):
    "Part of the dense model's layers that a parameter `layers` names."
    if layers is None: return 1.
    if isinstance(layers, float): return layers
    return (len(layers) if isinstance(layers, list) else layers)/LAYERS


def part(run, plan):
    "Part of the dense model that a run's model is, in the work of a token: layers, and what is cut out of them."
    p = run.params
    start = part(plan[p['model']], plan) if p.get('model') in plan else 1.
    if run.method == 'prune' and p['pattern'] in ('structured', 'lasso'): return start*(1 - p['sparsity'])
    if run.method == 'distill' and p.get('student') != 'model': return start*share(p.get('layers', .5))
    return start*share(p.get('layers')) if run.method == 'xtc' else start


def training(run, plan):
    "Seconds of one core."
    p = run.params
    if run.method == 'freeze_corpus': return FILE*p['files']
    if run.method == 'prune':
        whole = p['batch']*p.get('penalty_steps', 0) or p['samples']*(p['epochs'] - 1)          # samples, before the cut
        left = p['samples'] + p['batch']*p.get('recovery_steps', 0)                             # and after it
        return 3*UNIT*p['length']*(whole + left*part(run, plan)/part(plan.get(p['model'], DENSE), plan))
    if run.method == 'quantize': return 1.5*3*UNIT*512*p.get('finetune_samples', 0)
    if run.method == 'distill':
        teacher = 1 if p.get('frozen', True) else 3
        return UNIT*p['tokens']*(3*part(run, plan) + teacher) + 10*SAMPLE*p['curve_samples']
    if run.method == 'xtc': return 1.5*UNIT*p['tokens']*(3*part(run, plan) + 1)
    if run.method == 'pretrain':
        return sum(3*UNIT*s['layers']/LAYERS*s['steps']*s['batch']*s['length'] for s in p['stages'])
    return 0.


def judging(run):
    "Seconds of one core."
    p = run.params
    if run.method in ('measure', 'session', 'report', 'no_model', 'freeze_corpus'): return 0.
    lines = SAMPLE*(p['codexglue'] + .4*p['thesis'])*{'audit': 5, 'static_quantize': 2}.get(run.method, 1)
    tokens = 0 if run.method in ('onnx', 'audit', 'pretrain', 'evaluate') else p['held_out']
    return lines + 1.2*UNIT*tokens*{'static_quantize': 2, 'quantize': 1.5}.get(run.method, 1)   # the dense model's states are kept


def timing(run):
    "Seconds of two cores, since nothing else may run."
    p = run.params
    if run.method == 'measure': return 2*(8 + 2*.2*p['rounds']*p['completions'])   # 14; those of `gain` took 6 to 10
    return 2*93 if run.method == 'session' else 0.   # those of the three models took 278 s together


def budget():
    "Minutes of one core by group."
    found, plan = {}, read_profile('full')
    for run in plan.values():
        group = group_of(run)
        runs, minutes = found.get(group, (0, 0.))
        found[group] = runs + 1, minutes + (training(run, plan) + judging(run) + timing(run))/60
    return found


def as_comments(found):
    rows = [f'# {group:<26}{runs:>4} runs {minutes:>6.0f} min' for group, (runs, minutes) in found.items()]
    total = f'# {"together":<26}{sum(r for r, _ in found.values()):>4} runs {sum(m for _, m in found.values()):>6.0f} min'
    return '\n'.join([*rows, total])


def test_table_in_the_profile_is_what_its_runs_come_to():
    assert as_comments(budget()) in PROFILE.read_text(encoding='utf-8'), 'write this into configs/full.yaml:\n' + as_comments(budget())


def test_full_fits_into_twelve_hours_of_two_cores(): assert sum(m for _, m in budget().values()) <= 2*12*60


def test_every_row_has_enough_samples():
    for run in read_profile('full').values():
        if run.method in CORPORA | WITHOUT_MODEL - {'no_model'} or run.id == 'teacher-brief': continue
        if run.params.get('data') or run.step: continue   # other code, of which there may be less; steps are not judged
        assert run.params['skip'] == 200 and run.params['codexglue'] >= 1000, run.id
        if run.method != 'pretrain': assert run.params['thesis'] >= 500, run.id


JUDGED_BY_TOKENS = ('baseline', 'prune', 'quantize', 'static_quantize', 'gptq', 'distill', 'xtc')


def test_what_computes_here_is_judged_on_enough_tokens_all_the_same_ones():
    for run in read_profile('full').values():
        if run.method in JUDGED_BY_TOKENS and not run.step: assert run.params['held_out'] == 200_000, run.id


def test_whatever_trains_sees_the_whole_context():
    "Rows of 128 tokens left a control 0.3 nats worse beyond them, where most prompts end."
    for run in read_profile('full').values():
        if run.step: continue   # of a recipe, which distils on the whole context afterwards
        if run.method in ('prune', 'distill', 'xtc', 'quantize'): assert run.params.get('length', 512) == 512, run.id


def test_steps_of_recipes_are_not_judged():
    steps = [r.params for r in read_profile('full').values() if r.step]
    assert len(steps) > 10 and not any(p[k] for p in steps for k in ('codexglue', 'thesis', 'held_out'))


def test_students_see_two_million_tokens():
    runs = [r for r in read_profile('full').values() if r.method in ('distill', 'xtc')]
    assert len(runs) > 25 and all(r.params['tokens'] >= 2_000_000 for r in runs)


def test_fastest_recipe_reads_wider_text_and_so_does_its_control():
    plan = read_profile('full')
    made = plan['wide']
    assert made.method == 'freeze_corpus' and made.params['shipped']   # with the model's tokenizer
    assert 'measure-wide' not in plan                                  # there is no model to time
    recipes = [plan[f'recipe-half-pruned{seed}.2-distill'] for seed in ('', '-seed-43', '-seed-44')]
    for run in (*recipes, plan['distill-control-wide']):
        assert (run.params['corpus'], run.params['tokens']) == ('wide', 6_000_000), run.id
        assert 'wide' in run.needs, run.id
    others = [r for r in plan.values() if r.method == 'distill' and not r.params.get('corpus')]
    assert max(r.params['tokens'] for r in others if r.id != 'distill-8-before') == 2_000_000


def test_code_of_another_kind_is_pinned_permissive_and_unseen():
    plan = read_profile('full')
    runs = [r for r in plan.values() if r.method == 'evaluate']
    pins = (PROFILE.parent.parent/'requirements.txt').read_text(encoding='utf-8').splitlines()
    seen = set(pd.read_csv(CORPUS/'manifest.csv').project) | set(read_json(CORPUS/'summary.json')['projects']['test'])
    owners = packages_distributions()
    packages = {r.params['data'].removeprefix('installed:') for r in runs}
    for package in packages:
        assert len(owners[package]) == 1
        project = owners[package][0].lower().replace('_', '-')
        files = [f for f in installed_sources() if f.project == project]
        assert any(pin.lower().startswith(f'{project}==') for pin in pins), f'{project} is not pinned'
        assert files and all(is_permissive(f.license) for f in files), project
        assert split_of(project) != 'train' and project not in seen, f'{project} may have been trained on, or is in the corpus'
    judged = {p: {r.params['model'] for r in runs if r.params['data'] == f'installed:{p}'} for p in packages}
    assert len(packages) == 2 and len({frozenset(models) for models in judged.values()}) == 1
    assert {'baseline', 'onnx-dense-int8', 'recipe-pruned', 'recipe-half-pruned'} <= judged['optuna']
    assert all(r.params['codexglue'] >= 100 and not r.params['skip'] for r in runs)


def trains(run): return run.method in ('prune', 'distill', 'xtc') or run.id.startswith('recipe-')


PLAN = read_profile('full')
TRAINED = [*(i for i, run in PLAN.items() if run.main and trains(run)), 'lasso-none-0.6', 'lasso-taylor-0.6']


def test_main_table_has_a_row_of_every_method():
    rows = [run for run in PLAN.values() if run.main]
    beside = CORPORA | WITHOUT_MODEL - {'no_model'} | {'pretrain', 'gptq'}     # GPTQ's is there as the export that runs
    assert {run.method for run in rows} == {run.method for run in PLAN.values()} - beside
    assert {run.params['pattern'] for run in rows if run.method == 'prune'} == {'unstructured', 'tile', 'structured', 'lasso'}
    assert len(TRAINED) > 8


@pytest.mark.parametrize('run', TRAINED)
def test_rows_that_train_have_three_seeds(run):
    plan = read_profile('full')
    for seed in (43, 44):
        own, first = plan[f'{run}-seed-{seed}'].params, plan[run].params
        differ = {k for k in own if own[k] != first.get(k)}
        assert own['seed'] == seed and differ <= {'run_id', 'seed', 'model', 'held_out', 'curve_samples'}, differ
        assert 'model' not in differ or re.search(rf'-seed-{seed}(\.\d+-\w+)?$', own['model'])


def test_every_control_of_the_lasso_differs_in_nothing_but_the_choice():
    plan = read_profile('full')
    for s in (.4, .5, .6, .7, .8, .9):
        lasso, none, taylor = (plan[f'lasso-{v}{s}'].params for v in ('', 'none-', 'taylor-'))
        assert {k for k in none if none[k] != lasso.get(k)} == {'run_id', 'lam'} and none['lam'] == 0
        assert {k for k in taylor if taylor[k] != none.get(k)} == {'run_id', 'importance'}


def test_students_curves_are_of_a_hundred_samples():
    for run in read_profile('full').values():
        if run.method == 'distill' and not run.step and 'control' not in run.id and '-seed-' not in run.id:
            assert run.params['curve_samples'] >= 100, run.id


def test_every_step_that_distils_is_taught_by_the_dense_model():
    "As a recipe's is, which starts there; the teacher of a chain is not the student that an earlier step made."
    for run in read_profile('full').values():
        if run.method == 'distill' and run.params.get('student') == 'model': assert run.params['teacher'] == 'baseline', run.id


def test_styles_know_every_planned_method():
    for run in read_profile('full').values():
        if run.method in CORPORA | WITHOUT_MODEL - {'no_model'} or run.method == 'pretrain': continue
        family = compressor(SimpleNamespace(config=run.params, method=run.method))
        assert family is None or family in METHOD_STYLES, (run.id, family)


def test_gain_has_the_settings_of_full():
    """What README shows first is what `full` measures, too, apart from what is measured beside it. The last row of `gain` was taught by
    the six layers that it was cut from; in `full` the dense model teaches it, as in the recipe `half-pruned`."""
    full, beside = read_profile('full'), {'profile', 'thesis', 'held_out', 'watts', 'curve_samples', 'compare'}
    shared = [run for run in read_profile('gain').values() if run.id in full]
    assert len(shared) >= 20
    for run in shared:
        ours, theirs = ({k: v for k, v in r.params.items() if k not in beside} for r in (run, full[run.id]))
        if run.id == 'recipe-half-pruned.2-distill':
            assert (ours.pop('teacher'), theirs.pop('teacher')) == ('distill-6-teacher', 'baseline')
        assert ours == theirs, run.id
