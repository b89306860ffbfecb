"""Numbers that readers see: milliseconds and ratios of one table agree, and README and results page say what the result files say."""
import json, re, subprocess, numpy as np
from pathlib import Path
import pytest
from codegpt_nbc.report.frame import PEERS_PROFILES, benchmarks, engine_frame, frame, measured_ms, precision_of, versus
from codegpt_nbc.report.prose import MissingResult, render
from codegpt_nbc.report.publish import PAGES, page_text
from codegpt_nbc.report.tables import TABLES as TABLES_OF, as_markdown

ROOT = Path(__file__).resolve().parent.parent


def committed_tables():
    "Markdown tables under figures/ without those of the reader's own runs; an archive outside git has no others."
    listed = subprocess.run(['git', 'ls-files', 'figures/*/tab_*.md'], cwd=ROOT, capture_output=True, text=True)
    if not listed.stdout: return sorted((ROOT/'figures').glob('*/tab_*.md'))
    return [ROOT/name for name in listed.stdout.splitlines()]


FILES = [ROOT/'README.md', ROOT/'docs'/'results.md', *committed_tables()]
MILLISECONDS = ('ms', 'ms a completion')


def split(line): return [cell.strip() for cell in line.strip().strip('|').split('|')]


def tables(text):
    "The Markdown tables of a text: (columns, rows), a row being a list of cells."
    block = []
    for line in [*text.splitlines(), '']:
        if line.startswith('|'): block.append(line)
        elif block:
            yield split(block[0]), [split(b) for b in block[2:]]
            block = []


def printed(cell):
    "A printed number as (value, half of its last digit); None where there is none."
    found = re.match(r'[−+-]?(\d+(?:\.(\d+))?)', cell)
    if not found: return None
    return float(found[1]), .5*10**-len(found[2] or '')


def is_ratio(column): return column in ('× faster', 'faster', 'samples/s, × dense') or column.startswith('× ')


def timed_tables():
    for path in FILES:
        for n, (columns, rows) in enumerate(tables(path.read_text(encoding='utf-8')) if path.is_file() else []):
            ms, ratio = [c for c in columns if c in MILLISECONDS], [c for c in columns if is_ratio(c)]
            if ms and ratio: yield pytest.param(columns, rows, ms[0], ratio[0], id=f'{path.relative_to(ROOT)}:{n}')


def groups(columns, rows):
    "The rows of each baseline: one a table, but in a table of several benchmarks one in each run, or on each processor."
    at = next((columns.index(c) for c in ('run', 'processor') if c in columns), None)
    if at is None: return [rows]
    return [[r for r in rows if r[at] == run] for run in dict.fromkeys(r[at] for r in rows)]


@pytest.mark.parametrize('columns, rows, ms, ratio', list(timed_tables()))
def test_milliseconds_and_ratios_of_a_table_agree(columns, rows, ms, ratio):
    for group in groups(columns, rows):
        timed = [(r, printed(r[columns.index(ms)]), printed(r[columns.index(ratio)])) for r in group]
        if not any(time or factor for _, time, factor in timed): continue   # a profile that times other rows
        assert timed[0][2] == (1, .5), 'the baseline comes first, and its ratio is 1'
        base, base_half = timed[0][1]
        for row, time, factor in timed[1:]:
            if time is None or factor is None: continue
            least, most = (base - base_half)/(time[0] + time[1]), (base + base_half)/(time[0] - time[1])
            assert least <= factor[0] + factor[1] and most >= factor[0] - factor[1], f'{row[0]}: {base} / {time[0]} is not {factor[0]}'


def test_a_second_baseline_in_a_table_is_noticed():
    rows = [['a', '305', '1'], ['b', '100', '3.05'], ['c', '1858', '1']]
    with pytest.raises(AssertionError, match='c: 305.0 / 1858.0 is not 1'):
        test_milliseconds_and_ratios_of_a_table_agree(['what', 'ms', '× faster'], rows, 'ms', '× faster')


def test_some_tables_have_both_columns(): assert len(list(timed_tables())) >= 6


# --- README against the result files, read here without the code that writes it ---

def result(run, profile='full'): return json.loads((ROOT/'papermill_runs'/profile/f'{run}.json').read_text(encoding='utf-8'))


SHOWN = {'gain': ['baseline', 'onnx-dense-int8', 'recipe-int4', 'recipe-half', 'recipe-pruned', 'recipe-half-pruned'],
         'students': ['baseline', 'dense-int8', 'half-int8', 'half-pruned-int8', 'three-wide-int8', 'four-narrow-int8', 'three-small-int8']}


@pytest.fixture(scope='module')
def firsts():
    "The first tables of README, of the profiles of `SHOWN`: one list of rows each, one dict a row."
    found = tables((ROOT/'README.md').read_text(encoding='utf-8'))
    rows_of = {profile: [dict(zip(columns, row)) for row in rows] for profile, (columns, rows) in zip(SHOWN, found)}
    return {profile: [row for row in rows if not row['what you run'].startswith('no model: ')] for profile, rows in rows_of.items()}


@pytest.mark.parametrize('profile, n', [(profile, n) for profile, runs in SHOWN.items() for n in range(len(runs))])
def test_gain_tables_say_what_the_results_say(firsts, profile, n):
    name, row = SHOWN[profile][n], firsts[profile][n]
    assert len(firsts[profile]) == len(SHOWN[profile])
    run, speed, base = result(name, profile), result(f'measure-{name}', profile), result('measure-baseline', profile)
    ratio = 1. if n == 0 else speed['speed']['ratio_to_baseline']
    accuracy = run['metrics']['codexglue']
    expected = {'file MB': run['size']['raw_bytes']/1e6, 'peak MB': speed['memory']['peak_rss_bytes']/1e6, '× faster': ratio,
                'ms a completion': 1e3/base['speed']['samples_per_s']/ratio, 'ES %': accuracy['es']}
    for column, value in expected.items():
        shown, half = printed(row[column])
        assert abs(shown - value) <= half + 1e-9, f'{column}: {shown} is shown, {value} was found'
    low, high = map(float, re.search(r'\[([\d.]+), ([\d.]+)\]', row['ES %']).groups())
    assert (low, high) == tuple(float(f'{v:.1f}') for v in accuracy['es_ci'])


def difference(run, base='baseline', profile='full', measure='es'):
    "Mean difference of edit similarity, or of exact match, over the samples that both were asked."
    ours, theirs = (result(i, profile)['metrics']['codexglue'] for i in (run, base))
    def scores(a): return {a.get('skip', 0) + k: float(x) for k, x in enumerate(each(a, measure))}
    a, b = scores(ours), scores(theirs)
    both = a.keys() & b.keys()
    return sum(a[k] - b[k] for k in both)/len(both)


def each(accuracy, measure):
    "The measure of every sample, in per cent; exact matches are kept as one digit each."
    kept = accuracy[f'{measure}_each']
    return map(float, kept.split()) if measure == 'es' else [100*int(c) for c in kept]


def signed(cell):
    "A printed number with its sign, and half of its last digit."
    value, half = printed(cell)
    return (-value if cell.startswith('−') else value), half


def check(where, cell, value):
    shown, half = signed(cell)
    assert abs(shown - value) <= half + 1e-9, f'{where}: {cell} is shown, {value} was found'


@pytest.mark.parametrize('profile, n', [(profile, n) for profile, runs in SHOWN.items() for n in range(1, len(runs))])
def test_difference_from_the_dense_model(firsts, profile, n):
    name = SHOWN[profile][n]
    check(name, firsts[profile][n]['Δ ES'], difference(name, profile=profile))


@pytest.mark.parametrize('profile', ['gain', 'students', 'smollm2'])
def test_answers_without_a_model(profile):
    "They end the tables of README."
    columns, rows = [(c, r) for c, r in tables((ROOT/'README.md').read_text(encoding='utf-8')) if c[0] == 'what you run'][
        ['gain', 'students', 'smollm2'].index(profile)]
    for row, answer in zip(rows[-2:], ('constant', 'copy')):
        scores, = result(f'no-model-{answer}', profile)['metrics'].values()
        shown = dict(zip(columns, row))
        check(shown['what you run'], next(v for c, v in shown.items() if c.startswith('ES')), scores['es'])
        assert shown['file MB'] == shown['cost'] == '–'


# The tables of the results page: heading → (profile, the run of each row), as far as those have results
TABLES = {
    'Pruning': ('full', ['baseline', *(f'prune-{p}-{s}' for p in ('unstructured', 'tile', 'structured') for s in (.4, .6)), 'lasso-0.6']),
    'ONNX Runtime': ('full', ['baseline', *(f'onnx-{m}-{p}' for m in ('dense', 'pruned', 'structured') for p in ('fp32', 'int8'))]),
    'Four bits': ('full', ['baseline', 'onnx-dense-int8', 'gptq-int4', 'onnx-gptq-int4']),
    'Distillation': ('full', ['baseline', 'distill-4', 'distill-6', 'distill-8', 'distill-10', 'distill-12', 'distill-8-epochs',
                              'distill-8-pretrained', 'distill-6-teacher', 'recipe-half']),
    'One bit a weight': ('full', ['baseline', 'xtc-1bit-12', 'xtc-1bit-12-letter', 'xtc-reduced-6', 'xtc-hybrid-6', 'xtc-ternary-12',
                                  'xtc-ternary-6', 'recipe-half-binary']),
    'Mixed precision and groups of channels': ('full', ['baseline', 'static-w8a8', 'static-w8a8-min-max', 'static-mp', 'static-peg-3',
                                                        'static-peg-3-sorted', 'static-peg-6', 'static-peg-6-sorted', 'static-peg-all',
                                                        'onnx-static-w8a8']),
    'Your own repository': ('repository', ['baseline', 'dense-tuned', 'pruned-untuned', 'pruned-elsewhere-judged', 'pruned-tuned',
                                           'pruned-tuned-int8']),
}


def has_run(profile): return (ROOT/'papermill_runs'/profile/'baseline.json').is_file()


def section_of(heading):
    "What the results page says under a heading."
    text = (ROOT/'docs'/'results.md').read_text(encoding='utf-8')
    return re.split(r'\n##+ ', text.split(f'### {heading}\n', 1)[1])[0]


TABLES = {heading: (profile, runs) for heading, (profile, runs) in TABLES.items() if has_run(profile)}


def there(run, profile): return (ROOT/'papermill_runs'/profile/f'{run}.json').is_file()


def expected(run, profile):
    "What a row of a short table has to say, straight from the JSONs."
    r = result(run, profile)
    found = {'file MB': r['size']['raw_bytes']/1e6, 'ES %': r['metrics']['codexglue']['es']}
    found['EM %'] = r['metrics']['codexglue']['em']
    if run != 'baseline': found |= {f'Δ {m.upper()}': difference(run, profile=profile, measure=m) for m in ('es', 'em')}
    if run != 'baseline' and r.get('held_out'):
        own, dense = ([float(v) for v in h['loss_each'].split()] for h in (r['held_out'], result('baseline', profile)['held_out']))
        found |= {'KL': r['held_out']['kl'], 'Δ loss': sum(a - b for a, b in zip(own, dense, strict=True))/len(own)}
    if there(f'measure-{run}', profile): found['× faster'] = result(f'measure-{run}', profile)['speed']['ratio_to_baseline']
    return found | ({'× faster': 1.} if run == 'baseline' else {})


def shown_rows(heading):
    "The rows of the first table of models under a heading of the results page: dicts. None where the section waits for runs."
    part = section_of(heading)
    found = next(((c, r) for c, r in tables(part) if c[0] == 'model'), None)
    if not found and '*(Waits for ' in part: return []
    return [dict(zip(found[0], row)) for row in found[1] if not row[0].startswith('no model: ')]


def comparisons(heading):
    "(run, column, cell, value) of each number of a table."
    profile, runs = TABLES[heading]
    runs, rows = [i for i in runs if there(i, profile)], shown_rows(heading)
    if not rows: return
    assert len(rows) == len(runs), f'{heading}: {len(rows)} rows are shown, {len(runs)} have results'
    for run, row in zip(runs, rows):
        found = expected(run, profile)
        unknown = [c for c in row if c not in ('model', *found) and printed(row[c])]
        assert not unknown or run == 'baseline', f'{heading}: nothing checks the column {unknown[0]!r}'
        for column, value in found.items():
            if column in row: yield run, column, row[column], value


@pytest.mark.parametrize('heading', TABLES)
def test_table_says_what_the_results_say(heading):
    for run, column, cell, value in comparisons(heading): check(f'{heading}, {run}, {column}', cell, value)


def test_committed_tables_are_those_of_the_committed_results():
    fr = frame('full')
    assert set(fr.attrs['planned']) >= set(fr.index) and fr.attrs['main'] and fr.attrs['variants']
    for name in ('tab_main', 'tab_comparison', 'tab_xtc', 'tab_static', 'tab_session'):
        assert (ROOT/'figures'/'full'/f'{name}.md').read_text(encoding='utf-8') == as_markdown(TABLES_OF[name](fr)) + '\n', name


def test_more_than_thirty_numbers_are_computed_anew():
    assert sum(len(list(comparisons(heading))) for heading in TABLES) >= 100


def test_a_wrong_number_is_noticed():
    check('here', '−23.1 (p ≤ 0.001)', -23.06)
    for cell, value in (('−23.1 (p ≤ 0.001)', 23.1), ('46.8', 46.9), ('2.35', 2.36)):
        with pytest.raises(AssertionError, match='was found'): check('here', cell, value)


def test_sentences_on_few_bits():
    said, (profile, _) = section_of('One bit a weight'), TABLES['One bit a weight']
    dense = result('baseline', profile)
    for run in ('xtc-1bit-12', 'xtc-hybrid-6', 'xtc-ternary-12', 'xtc-ternary-6') if shown_rows('One bit a weight') else ():
        r = result(run, profile)
        kept = 100*(1 + difference(run, profile=profile)/dense['metrics']['codexglue']['es'])
        smaller = dense['size']['raw_bytes']/r['size']['raw_bytes']
        assert re.search(rf"{kept:.0f} % \(95 % \d+ to \d+; {r['size']['raw_bytes']/1e6:.1f} MB, {smaller:.0f} times smaller\)", said), run


def test_sentences_of_the_results_page():
    said = (ROOT/'docs'/'results.md').read_text(encoding='utf-8')
    pruned, control, structured = (result(i, 'full') for i in ('prune-unstructured-0.6', 'control', 'prune-structured-0.6'))
    share = 100*pruned['size']['zip_bytes']/control['size']['zip_bytes']
    assert f'the zip of the unstructured model is {share:.0f} % of the control' in said
    es = [r['metrics']['codexglue']['es'] for r in (pruned, structured, control)]
    models = [f'{es[0]:.1f} % for the unstructured model', f'{es[1]:.1f} % for the structured one', f'and {es[2]:.1f} % for the control']
    assert f"ES is {', '.join(models)}" in said
    audit = result('audit', 'full')['details']
    assert f"That leaves {100*audit['missed_blocks']['blocks missed']['int8_share']:.0f} % of the weights in int8" in said
    ratio = result('measure-onnx-dense-fp32', 'full')['speed']['ratio_to_baseline']
    assert f"at {ratio:.1f} times PyTorch's speed in float32" in said
    peers = result('codegpt', 'peers')['details']['engines']['onnx int8']
    assert f"the same model peaks at {peers['peak_mb']:.0f} MB" in said
    assert f"`onnx int8` peaks at {result('measure-onnx-dense-int8', 'codegpt')['memory']['peak_rss_bytes']/1e6:.0f} MB" in said


@pytest.mark.parametrize('profile', PEERS_PROFILES)
def test_no_engine_beats_its_floor(profile):
    "A floor that an engine beats was measured beside other programs."
    alone = [d for d in benchmarks(profile) if d['batch'] == 1]
    assert alone
    for d in alone:
        faster = {engine: r.ms for engine, r in engine_frame(d).iterrows() if r.ms < measured_ms(d['floor'][precision_of(engine)], d)}
        assert not faster, (d['geometry'], d['floor'])


def interval_text(run, base, profile):
    "The paired difference of two runs, as sentences have it."
    def scores(i): return np.array(result(i, profile)['metrics']['codexglue']['es_each'].split(), float)
    d = scores(run) - scores(base)
    drawn = np.random.default_rng(1).integers(len(d), size=(4000, len(d)))
    return d.mean(), np.percentile(d[drawn].mean(1), [2.5, 97.5])


@pytest.mark.skipif(not has_run('repository'), reason='the profile repository has not been run')
def test_sentences_on_ones_own_repository():
    said, readme = ((ROOT/name).read_text(encoding='utf-8') for name in ('docs/results.md', 'README.md'))
    part = said.split('### Your own repository\n')[1].split('\n## ')[0]
    form = r'([+−]?\d+\.\d) points(?: of ES)? \(95 % ([+−]?\d+\.\d) to ([+−]?\d+\.\d)'
    pairs = [('pruned-tuned', 'pruned-untuned'), ('pruned-tuned', 'pruned-elsewhere-judged'), ('pruned-tuned', 'baseline'),
             ('pruned-tuned', 'dense-tuned'), ('dense-tuned', 'baseline')]
    found = re.findall(form, part)
    assert len(found) == len(pairs)
    shown = re.search(form, readme.split('On the package mitmproxy')[1]).groups()
    for (run, base), (mean, low, high) in [*zip(pairs, found), (pairs[1], shown)]:
        difference, interval = interval_text(run, base, 'repository')
        check(f'{run} from {base}', mean, difference)
        for cell, value in zip((low, high), interval):   # of another bootstrap
            assert abs(signed(cell)[0] - value) <= .05 + .1*(interval[1] - interval[0]), (run, base, cell, value)
    n = result('baseline', 'repository')['metrics']['codexglue']['n']
    assert f'on {n:,} lines of other files' in part and f'{n:,} lines' in readme


@pytest.fixture(scope='module')
def full(): return frame('full')


@pytest.mark.parametrize('target', PAGES)
def test_page_is_what_its_source_and_the_results_give(target):
    assert (ROOT/target).read_text(encoding='utf-8') == page_text(target), f'{target}: call make readme'


def test_readme_is_short(): assert len((ROOT/'README.md').read_text(encoding='utf-8').splitlines()) < 180


def test_placeholder_without_a_result_is_an_error(full, tmp_path):
    (tmp_path/'page.md').write_text("{{ run('prune-structured-0.65').raw_mb | num }} MB", encoding='utf-8')
    with pytest.raises(MissingResult) as e: render('page.md', full, folder=tmp_path)
    assert str(e.value) == ("page.md: {{ run('prune-structured-0.65') }} has no result, because the profile 'full' has no result of the "
                            "run 'prune-structured-0.65': call make reproduce PROFILE=full.")


def test_wide_layers_beat_narrow_ones_and_pruning_saves_time():
    "As the results page says."
    fr = frame('students')
    assert versus(fr, 'three-wide-int8', 'four-narrow-int8')['es']['ci'][0] > 0
    low, high = versus(fr, 'three-wide-int8', 'half-pruned-int8')['es']['ci']
    assert low < 0 < high and fr.ratio['three-wide-int8'] > fr.ratio['half-pruned-int8']
    assert fr.raw_mb['three-wide-int8'] > fr.raw_mb['half-pruned-int8']
    assert fr.ratio['half-pruned-int8'] > 1.3*fr.ratio['half-int8'] and versus(fr, 'half-pruned-int8', 'half-int8')['es']['ci'][1] < 0
    assert versus(fr, 'three-wide', 'four-narrow')['es']['ci'][0] > 0   # without rounding, too


def test_bits_alone_make_no_difference_that_the_samples_show():
    "As README says."
    fr = frame('gain')
    for run in ('onnx-dense-int8', 'recipe-int4'):
        low, high = versus(fr, run, 'baseline')['es']['ci']
        assert low < 0 < high, run
