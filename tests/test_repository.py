"""What cannot stand inside a notebook: the repository as a whole."""
import json, re, shutil, subprocess, sys
from pathlib import Path
import pandas as pd, pytest
from codegpt_nbc.runs.grid import NOT_PROFILES, check_parameters, read_profile, template_of
from codegpt_nbc.core.paths import ASSETS, CORPUS, EMBEDDED, read_json, verify_checksums
from codegpt_nbc.core.record import load_results
from codegpt_nbc.data.corpus import header_license
from codegpt_nbc.runs.notebooks import is_stale, notebooks

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
TEMPLATES = sorted((ROOT/'nbs'/'experiments').glob('*.ipynb'))
PROFILES = sorted(p.stem for p in (ROOT/'configs').glob('*.yaml') if p.stem not in NOT_PROFILES)


def cells(path): return json.loads(path.read_text())['cells']


@pytest.mark.parametrize('path', TEMPLATES, ids=lambda p: p.stem)
def test_template_has_one_parameters_cell_and_defines_nothing(path):
    code = [c for c in cells(path) if c['cell_type'] == 'code']
    assert sum('parameters' in c['metadata'].get('tags', []) for c in code) == 1
    assert 'from_cell(globals())' in ''.join(code[1]['source']), 'the cell after the parameters validates them'
    assert not any(line.startswith('#| export') for c in code for line in c['source'])


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_small_and_without_errors(path):
    assert path.stat().st_size < 400_000
    assert not any(o['output_type'] == 'error' for c in cells(path) for o in c.get('outputs', []))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_no_test_of_a_notebook_writes_the_package(path):
    "Two are tested at a time: one would write what the other imports."
    exporting = [source for c in cells(path) if c['cell_type'] == 'code' and 'nbdev_export()' in (source := ''.join(c['source']))]
    assert [source for source in exporting if '#| eval: false' not in source] == []


@pytest.mark.parametrize('path', TEMPLATES, ids=lambda p: p.stem)
def test_template_is_committed_without_outputs(path):
    assert not any(c.get('outputs') for c in cells(path)), 'papermill executes templates: clear the outputs'


@pytest.mark.parametrize('path', notebooks(ROOT), ids=lambda p: p.stem)
def test_notebook_is_committed_executed(path):
    outputs = [o for c in cells(path) for o in c.get('outputs', [])]
    assert outputs and not is_stale(path), f'{path.name}: call make export'
    assert [o for o in outputs if o.get('name') == 'stderr'] == [], 'a reader needs no warnings'


@pytest.mark.parametrize('profile', PROFILES)
def test_profile_asks_only_for_what_templates_have(profile):
    for run in read_profile(profile).values(): check_parameters(template_of(run.method), run.params)


def test_package_is_what_the_notebooks_export(tmp_path):
    copy = tmp_path/'repo'
    left_out = ('.venv*', '.git', 'build', 'assets', 'papermill_runs', 'figures', '.snakemake', '__pycache__', '_site')
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left_out))
    for p in (copy/'codegpt_nbc').rglob('*.py'): p.unlink() if not p.name.startswith('__') else None
    command = [sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()']
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    for p in sorted((ROOT/'codegpt_nbc').rglob('*.py')):
        name = p.relative_to(ROOT)
        if p.name != '_modidx.py': assert (copy/name).read_text() == p.read_text(), f'{name}: call make export'


def test_assets_are_whole():
    for folder in (*EMBEDDED.values(), CORPUS): verify_checksums(folder)
    sizes = [(folder/'model.safetensors').stat().st_size for folder in EMBEDDED.values()]
    assert max(sizes) <= 25_000_000 and sum(sizes) <= 52_000_000
    assert not [p for p in ASSETS.rglob('*') if p.suffix in ('.bin', '.pt', '.pkl', '.pickle')], 'no pickle is shipped'


def test_assets_carry_the_licences_of_the_corpus():
    "Each project is named above a text, or among the few that came without one."
    text = (CORPUS/'LICENCES.txt').read_bytes().decode('utf-8')
    lines = set(text.split('\n'))
    manifest = pd.read_csv(CORPUS/'manifest.csv', dtype=str, keep_default_na=False)
    projects = sorted({f'{r.project} {r.version}' for r in manifest.itertuples()})
    assert [p for p in projects if p not in lines] == [] and len(projects) > 300
    texts, without = text.split('No licence file came with the projects that follow.')
    assert [p for p in projects if f'\n{p}\n' in without and f'\n{p}\n' in texts] == []
    assert sum(f'\n{p}\n' in without for p in projects) <= 3
    assert '\r' not in text and len(text) < 1_500_000
    assert 'LICENCES.txt' in read_json(CORPUS/'checksums.json')


def test_assets_name_the_licence_of_a_files_own_header():
    manifest = pd.read_csv(CORPUS/'manifest.csv', dtype=str, keep_default_na=False).set_index(['project', 'path']).license
    others = {}
    for name in ('train', 'valid', 'test'):
        for f in pd.read_parquet(CORPUS/'raw'/f'{name}.parquet').itertuples():
            assert f.license == manifest[f.project, f.path]
            if own := header_license(f.text): others[f.path] = (own, f.license)
    assert others == {'jupyter_client/ssh/forward.py': ('LGPL-2.1-or-later', 'LGPL-2.1-or-later')}
    licences = (CORPUS/'LICENCES.txt').read_text(encoding='utf-8')
    assert 'GNU LESSER GENERAL PUBLIC LICENSE' in licences and 'file jupyter_client/ssh/forward.py alone' in licences


def test_committed_results_are_valid_and_readable():
    for profile in ('full', 'pretrain', 'students'):
        for name in load_results(profile):
            book = ROOT/'papermill_runs'/profile/f'{name}.ipynb'
            assert book.is_file() and book.stat().st_size < 300_000
            assert not any(o['output_type'] == 'error' for c in cells(book) for o in c.get('outputs', []))


def test_no_result_was_made_with_uncommitted_changes():
    files = [*(ROOT/'papermill_runs').glob('*/*.json')]
    assert len(files) > 200 and not [p.name for p in files if json.loads(p.read_text(encoding='utf-8')).get('provenance', {}).get('dirty')]


def test_the_record_is_of_one_commit():
    "Whatever of `full` has been run was run at one commit, with nothing changed, on the same samples of the same model."
    results = {name: r for name, r in load_results('full').items() if r.method != 'report'}
    assert results and {r.provenance.dirty for r in results.values()} == {False}
    assert len({r.provenance.git_commit for r in results.values()}) == 1
    assert not set(results) - set(read_profile('full')), 'every run is in the plan'
    judged = {(protocol, a.skip, a.n) for name, r in results.items() for protocol, a in r.metrics.items()
              if r.method != 'audit' and not name.startswith('elsewhere-')}
    assert judged == {('codexglue', 200, 1000), ('thesis', 200, 500)}


def test_the_record_ran_todays_templates():
    def code(path): return [''.join(c['source']) for c in cells(path) if c['cell_type'] == 'code'
                            and 'injected-parameters' not in c['metadata'].get('tags', [])]
    templates = {}
    for name, r in load_results('full').items():
        template = templates.setdefault(r.method, code(template_of(r.method)))
        assert code(ROOT/'papermill_runs'/'full'/f'{name}.ipynb') == template, f'{name}: its template has changed since'


def test_the_toolkits_environment_has_what_its_templates_import():
    "A template with the parameter `backend` may run there; a package that is missing would be noticed after minutes of training."
    pinned = {line.split('==')[0].lower() for line in (ROOT/'requirements-itrex.txt').read_text().splitlines() if '==' in line}
    templates = [p for p in (ROOT/'nbs'/'experiments').glob('*.ipynb') if "backend = " in p.read_text()]
    assert len(templates) > 1
    for path in templates:
        code = '\n'.join(''.join(c['source']) for c in cells(path) if c['cell_type'] == 'code')
        names = set(re.findall(r'^ *(?:import|from) (\w+)', code, re.M)) - {*sys.stdlib_module_names, 'codegpt_nbc'}
        assert names <= pinned, f'{path.name} imports {names - pinned}: pin it in requirements-itrex.txt'


def test_every_folder_of_imports_can_be_forgotten():
    "What is imported is kept for each state of the files: without a way to remove it, `build/` grows for ever."
    source = '\n'.join(p.read_text() for p in (ROOT/'codegpt_nbc').rglob('*.py'))
    folders = {f'build/{name}' for name in re.findall(r"project_root\(\)/'build'/'(\w+)'", source)}
    said = subprocess.run(['make', '-n', '--no-print-directory', 'forget'], cwd=ROOT, capture_output=True, text=True, check=True)
    removed = said.stdout.split()
    assert len(folders) > 1 and removed[:2] == ['rm', '-rf'] and set(removed[2:]) == folders
    about = (ROOT/'CONTRIBUTING.md').read_text()
    assert all(f'`{folder}`' in about for folder in folders)


def test_nothing_names_a_machine():
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode: pytest.skip('not a git checkout')
    bad = re.compile(r'["\'\s(=-](/(?:home|root|work|tmp|Users|etc|run|opt|mnt)/[\w.-]+)')
    for name in tracked.stdout.split():
        p = ROOT/name
        if p.suffix not in ('.png', '.svg', '.parquet', '.safetensors') and p != Path(__file__).resolve() and p.is_file():
            assert not (m := bad.search(p.read_text(errors='ignore'))), f'{name} carries the path {m[1]}'


def test_the_map_of_the_notebooks_is_of_today():
    told = ''.join(''.join(t) for c in cells(ROOT/'nbs'/'index.ipynb') for o in c.get('outputs', []) for t in o.get('data', {}).values())
    for path in (p for p in notebooks(ROOT) if p.parent != ROOT/'nbs'):
        head = ''.join(cells(path)[0]['source']).partition('\n> ')[2].partition('\n')[0]
        assert head and head.rstrip('.') in told, f'{path.name}: execute nbs/index.ipynb'


@pytest.mark.parametrize('profile', PROFILES)
def test_no_speed_is_older_than_the_model(profile):
    results = load_results(profile)
    for r in results.values():
        model = results.get(r.config.get('target')) if r.method == 'measure' else None
        if model: assert r.provenance.started >= model.provenance.started, f'{r.run_id}: measure it again'
