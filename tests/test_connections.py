"""What connects the measured pieces: which split, which model, which way round, whose rows, which seed."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from codegpt_nbc.core.paths import BASE_MODEL
from codegpt_nbc.core.record import load_results
from codegpt_nbc.data.inputs import RunConfig
from codegpt_nbc.evidence import evaluate as evaluating
from codegpt_nbc.evidence import measure as measuring
from codegpt_nbc.evidence.cost_table import Workload
from codegpt_nbc.evidence.held_out import figures_of_rows, held_out_of, held_out_rows
from codegpt_nbc.evidence.metrics import paired
from codegpt_nbc.methods import distill as distilling
from codegpt_nbc.methods import gptq as gptqs
from codegpt_nbc.methods import prune as pruning
from codegpt_nbc.methods.distill import DistillConfig, distill
from codegpt_nbc.methods.eight_bits import most_costly
from codegpt_nbc.methods.gptq import GptqConfig, calibration_sets
from codegpt_nbc.methods.prune import Masked, PruneConfig, Tile, coupled_groups, matrices, prune, taylor_importance
from codegpt_nbc.model import train
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.folder import load_model
from codegpt_nbc.model.layers import Shape
from codegpt_nbc.model.train import Samples, TrainResult, Windows, next_token_loss, training_rows
from codegpt_nbc.report.figures import quantized_values
from codegpt_nbc.report.frame import absent, frame, split_time, versus
from codegpt_nbc.report.toy import save_result, toy_home
from codegpt_nbc.runs import budget, search, steps
from codegpt_nbc.runs.grid import ALONE, template_of, template_parameters
from test_rare import tiny

SHAPE = Shape(300, 32, 16, 8, (2, 2), (32, 32))


class Invented:
    "A worker without a model. One round is disturbed."
    totals = {'model': (1., 4., 2.), 'dense': (3., 8., 8.)}   # seconds, a round
    def __init__(self, folder, **_): self.folder, self.left = folder, [*self.totals[folder]]
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def read(self): return {'ready': 'invented'}
    def ask(self, n):
        asked.append(self.folder)
        t = self.left.pop(0)
        return dict(times=[dict(total=t, prefill=.6*t, decode=.01*t)]*n, peak={'model': 10, 'dense': 30}[self.folder], floor=5)

asked = []


def test_a_measurement_takes_turns_and_is_of_medians_a_completion(monkeypatch):
    class SixJoules:
        joules, source = 0., 'RAPL'
        def __init__(self, watts): pass
        def __enter__(self): pass
        def __exit__(self, *_): self.joules += 6
    for name, stub in dict(Worker=Invented, Meter=SixJoules, SETTLE=0, text_of=lambda folder: 'codexglue').items():
        monkeypatch.setattr(measuring, name, stub)
    asked.clear()
    speed, memory, d = measuring.measure('model', 'dense', rounds=3, completions=2, threads=1)
    assert asked == ['dense', 'model', 'model', 'dense', 'dense', 'model']
    assert (d['ratios'], speed.ratio_to_baseline, speed.ratio_spread) == ([3., 2., 4.], 3., (2., 4.))
    assert (speed.samples_per_s, speed.prefill_ms, speed.decode_ms_per_token) == pytest.approx((1/2, 1200, 20))
    assert (speed.joules, d['baseline_joules'], d['baseline_samples_per_s']) == pytest.approx((3, 3, 1/8))
    assert (memory.peak_rss_bytes, d['baseline_peak_rss_bytes'], d['libraries_rss_bytes']) == (10, 30, 5)


def test_held_out_figures_are_those_of_the_runs_own_model(home):
    model, *dense = (tiny(home/f'{seed}', seed) for seed in range(3))
    for folder in dense:
        c = RunConfig(run_id='x', held_out=512, reference=str(folder))
        loss, kl = figures_of_rows(load_model(model), load_model(folder), held_out_rows(c, model, 512))
        h = held_out_of(c, model)
        assert (h.loss, h.kl) == pytest.approx((loss.mean(), kl.mean()), abs=2e-5) and h.kl > 0


def test_what_chooses_is_judged_on_validation_samples_and_what_reports_passes_over_the_seen(home, monkeypatch):
    seen = []
    def scores_of(folder, n, split='test', data=None, skip=0):
        seen.append((split, n, skip))
        return SimpleNamespace(es=1., es_ci=(0, 2), em=1., n=n), 64
    for room in (search, budget): monkeypatch.setattr(room, 'scores_of', scores_of)
    monkeypatch.setattr(budget, 'timed_folder', lambda *_: (1., 1., 1))
    monkeypatch.setattr(evaluating, 'against', lambda a, b: {'es': dict(difference=0., ci=[0., 0.])})
    search.judge('dense', BASE_MODEL, BASE_MODEL, search.Rung(budgets={}, samples=4))
    s = budget.Search(budget.BudgetConfig(run_id='x', samples=5, skip=200).with_samples(7))
    s._judged(BASE_MODEL)
    s.unseen(SimpleNamespace(best=budget.Candidate('best', BASE_MODEL, 1., 1., 1., 0, []), fixed=[]))
    assert seen == [('valid', 4, 0), ('valid', 5, 0), ('test', 7, 200)]


def test_a_learning_curve_is_of_validation_and_a_run_of_the_test_samples_it_names(monkeypatch):
    seen = []
    def evaluate(engine, tok, protocol, n, split='test', folder=None, skip=0, **_):
        seen.append((protocol, n, split, skip))
        return pd.DataFrame(dict(em=[1], es=[50], identifier_f1=[1.], whole=[1])), 0.
    monkeypatch.setattr(evaluating, 'evaluate', evaluate)
    monkeypatch.setattr(evaluating, 'open_engine', lambda folder: (None, None))
    evaluating.validation_es(Decoder(SHAPE), None, 3)()
    metrics, _ = evaluating.evaluate_run(RunConfig(run_id='x', codexglue=7, thesis=0, skip=200), None)
    assert seen == [('codexglue', 3, 'valid', 0), ('codexglue', 7, 'test', 200)] and metrics['codexglue'].skip == 200


def test_gptq_is_judged_on_files_that_it_was_not_calibrated_on(monkeypatch):
    monkeypatch.setattr(gptqs, 'encode_batch', lambda tok, texts: [[i]*40 for i in range(len(texts))])
    used, judged = (set(ids.flatten().tolist()) for ids in calibration_sets(GptqConfig(run_id='x', calibration=8, length=32)))
    assert len(used) == len(judged) == 8 and not used & judged


def test_before_and_after_keep_their_places(monkeypatch):
    def accuracy(folder, *_):
        es = {'dense': 60, 'small': 50}[folder]
        return SimpleNamespace(es=es, em=1., n=4, skip=0, es_each=' '.join([str(es)]*4), em_each='1111'), 64
    def measure(target, baseline, *_, **__):
        assert (target, baseline) == ('small', 'dense')
        d = dict(baseline_samples_per_s=2., baseline_peak_rss_bytes=4e6)
        return SimpleNamespace(samples_per_s=6., ratio_to_baseline=3.), SimpleNamespace(peak_rss_bytes=1e6), d
    monkeypatch.setattr(steps, 'scores_of', accuracy)
    monkeypatch.setattr(measuring, 'measure', measure)
    monkeypatch.setattr(evaluating, 'size_of', lambda folder: SimpleNamespace(raw_bytes=1e6, zip_bytes=1e6, params=1e6))
    table = steps.before_after('dense', 'small', 4)
    assert table.after[['ES %', 'ES − before, at least', 'samples/s, × before', 'peak MB']].tolist() == [50, -10, 3, 1]
    assert table.before[['ES %', 'ES − before, at least', 'ms a completion', 'peak MB']].tolist() == [60, 0, 500, 4]


def test_distillation_keeps_the_zeros_of_a_masked_student(home):
    student, teacher = Decoder(SHAPE).init_weights(), Decoder(SHAPE).init_weights(1)
    with torch.no_grad(): student.blocks[0].mlp.up.weight[:, ::2] = 0
    rows = [[(7*i + j) % 300 for j in range(33)] for i in range(32)]
    distill(student, teacher, rows, DistillConfig(run_id='x', student='model', tokens=1024, length=32, lr=1e-2))
    w = student.blocks[0].mlp.up.weight
    assert not w[:, ::2].any() and w[:, 1::2].all()


def test_another_teacher_is_asked_anew(home, monkeypatch):
    names, model = [], tiny(home/'m')
    def taught(teacher, data, path): names.append(path.name); raise InterruptedError
    monkeypatch.setattr(distilling, 'taught', taught)
    teachers = [tiny(home/f't{seed}', seed) for seed in (1, 2)]
    how = dict(run_id='x', model=str(model), epochs=2, tokens=256, length=32, layers=[0], validation=4)
    configs = [DistillConfig(teacher=str(teacher), **how) for teacher in teachers]
    for c in configs:
        with pytest.raises(InterruptedError): distilling.distill_step(c)
    assert len(set(names)) == 2
    monkeypatch.setattr(DistillConfig, 'model_dump_json', lambda self: '')   # a teacher of the same name, made again
    assert configs[0].work != configs[1].work


def test_students_are_trained_as_distilberts_code_does():
    rows = [[0]*17]*40
    for student, lr in (('random', 5e-4), ('reduced', 2e-4), ('model', 2e-4)):
        t = DistillConfig(run_id='x', student=student).training(rows)
        assert (t.lr, t.betas, t.weight_decay, t.clip, t.schedule, t.steps) == (lr, (.9, .98), 0., 0., 'cosine', 10)


def test_another_seed_draws_other_text(monkeypatch):
    a, b = (np.concatenate([Samples([[1]]*50, 5, seed=seed).order(i) for i in range(10)]) for seed in (0, 1))
    assert sorted(a) == sorted(b) == [*range(50)] and (a != b).any()
    assert not torch.equal(*(Windows(np.arange(5000, dtype=np.uint16), 4, 8, seed)(0)[0] for seed in (0, 1)))
    monkeypatch.setattr(train, 'encode_batch', lambda tok, texts: texts)
    files, usual = [[i]*(13 + i) for i in range(50)], dict(shortest=1., length=99, tokens=None, epochs=1, seed=0)
    def drawn(**own): return training_rows(files, None, SimpleNamespace(**usual | own))
    assert drawn() != drawn(seed=1) and sorted(drawn()) == sorted(drawn(seed=1)) == files
    assert sorted(drawn(shortest=.5)) == files[:25]


def test_the_legacy_penalty_pulls_to_zero():
    m = Decoder(SHAPE).init_weights()
    with torch.no_grad(): m.blocks[0].mlp.up.weight[0, :4] = 0
    for p in m.parameters(): p.grad = torch.full_like(p, .25)
    Masked(Tile(), .5).add_penalty(m)
    for name, p in m.named_parameters():
        w = p.detach()
        want = torch.where(w == 0, 0., .25 + .5*w.sign()) if name in matrices(m) else torch.full_like(w, .25)
        torch.testing.assert_close(p.grad, want)


def test_taylor_scores_add_magnitudes_of_batches():
    rows = torch.randint(300, (4, 20), generator=torch.Generator().manual_seed(0)).tolist()
    m, batches, want = Decoder(SHAPE).init_weights(), Samples(rows, 2, 19), 0
    group = coupled_groups(m.shape)[1]
    for i in range(2):
        m.zero_grad()
        next_token_loss(m, batches(i)).backward()
        want = want + group.sum(lambda p: p.detach()*p.grad, m).abs()
    found, = taylor_importance(m, [group], batches, 2)
    torch.testing.assert_close(found, want/group.sum(torch.ones_like, m), rtol=.05, atol=1e-7)   # bfloat16, where it is fast


def test_recovery_sees_none_of_the_rows_of_the_penalty(monkeypatch):
    seen = []
    def fit(model, data, c, *_, **__):
        seen.append(([*map(tuple, data.rows)], c.schedule))
        return TrainResult(0, 0., [], c.steps)
    monkeypatch.setattr(pruning, 'fit', fit)
    new = [[i]*9 for i in range(20)]
    c = PruneConfig(run_id='x', sparsity=0., batch=2, length=8, penalty_steps=4, recovery_steps=3, samples=4)
    prune(Decoder(SHAPE).init_weights(), [[99]*9]*4, c, new)
    (penalty, _), (short, one), (long, other) = seen
    assert [*map(list, penalty)] == new[:8] and [*map(list, long)] == new[8:] and (one, other) == ('cosine', 'cosine')


def test_the_hours_of_a_budget_are_shared_by_its_rungs(monkeypatch):
    s = budget.Search(budget.BudgetConfig(run_id='x', budget=dict(es_drop=1, hours=.01)))
    point = SimpleNamespace(cut=lambda shape: True)
    def made(self, name, steps, point): return budget.Candidate(name, Path(name), 50., 1., 1., sum(steps), list(steps))
    for name, stub in dict(made=made, rate=lambda self, p: 1e4, steps_of=lambda self, p, trained: trained).items():
        monkeypatch.setattr(budget.Search, name, stub)
    monkeypatch.setattr(budget.Search, 'shape', None)
    rungs = s.recovered([SimpleNamespace(point=point)]*3, 60.)
    longest = {}
    for rung in rungs: longest |= {c.name: c.steps[1:] for c in rung}     # without the warm-up
    assert .9*36*1e4 < sum(map(sum, longest.values())) <= 36*1e4        # 36 seconds


def test_vocabularies_are_judged_by_other_files_than_tokens_are_counted_on():
    v = budget.Search(budget.BudgetConfig(run_id='x', counted=20)).vocabulary
    assert not set(v.texts) & set(v.held) and len(v.texts) == 45 and len(v.held) == 15


def test_a_figures_points_are_the_tables_differences(home, monkeypatch):
    made, fr = toy_home(), frame('toy')
    run = fr.index[fr.method == 'quantize'][0]
    base = fr.model[run]
    for title, score in (('edit similarity', 'es'), ('exact match', 'em')):
        assert np.mean(quantized_values(fr, run, title)) == pytest.approx(versus(fr, run, base)[score]['difference'], abs=1e-3)
    assert quantized_values(fr, run, 'peak memory') == [100*fr.peak_ratio[run]/fr.peak_ratio[base]]
    assert np.median(quantized_values(fr, run, 'samples/s')) == pytest.approx(100*fr.ratio[run]/fr.ratio[base])
    t = split_time(fr).loc[run]
    row = fr.loc[run]
    assert t.prefill/t.decode == pytest.approx(row.prefill_ms/(row.decode_ms_per_token*(row.new_tokens - 1)))
    made.cleanup()


def test_a_table_has_the_speeds_of_one_processor(home):
    made = toy_home()
    run = load_results('toy')['measure-ptq-dense-sym-tensor-all']
    there = frame('toy')
    save_result(run.model_copy(update={'provenance': run.provenance.model_copy(update={'cpu': 'a server (2 cores; avx2 amx_int8)'})}))
    fr, target = frame('toy'), run.config['target']
    assert not np.isnan(there.ratio[target]) and np.isnan(fr.ratio[target]) and np.isnan(fr.ms[target]) and np.isnan(fr.peak_mb[target])
    assert fr.ratio.drop(target).equals(there.ratio.drop(target))
    assert absent(there) == '' and absent(fr) == f'Speed not measured yet on the processor of this table: {target}.'
    made.cleanup()


def test_whatever_is_timed_runs_alone():
    templates = template_of('measure').parent.glob('*.ipynb')
    assert {p.stem for p in templates if {'prompt_tokens', 'new_tokens'} & template_parameters(p).keys()} == ALONE


def test_a_completion_is_its_prompt_and_each_token_after_the_first():
    assert Workload(1, 16).ms(100., 2.) == pytest.approx(130.)


def test_the_most_costly_matrices_are_so_by_their_weight():
    "By the cost alone it would be `b`, which takes two thirds of the room for half as much again."
    assert most_costly({'a': 1., 'b': 1.5}, {'a': 10, 'b': 20}, .7) == ['a']


@pytest.mark.parametrize('n', [1, 8, 1000])
def test_no_difference_in_few_samples_is_no_proof_of_none(n):
    "If a share p of all lines differs, none of n does with a probability of (1 − p)^n: 5 % at the bound."
    found = paired([50.]*n, [50.]*n)
    assert found['difference'] == 0 and found['ci'][0] == -found['ci'][1]
    assert (1 - found['ci'][1]/100)**n == pytest.approx(.05, abs=.001)
