# The grid. configs/<profile>.yaml lists the runs, and a run does what its template notebook says.
# Usually called through `make reproduce`, which adds a lock; `snakemake --cores 2 --config profile=quick` works too.
import json, shlex, sys
from snakemake.jobs import Job
from codegpt_nbc.runs.grid import ALONE, WITHOUT_MODEL, read_profile, resources, template_of
from codegpt_nbc.core.paths import BASE_MODEL, CORPUS, models_dir, write_json

async def leave(job): pass
Job.remove_existing_output = leave   # a run replaces what there is when its own files are whole, see `grid.run_notebook`

PYTHON = shlex.quote(sys.executable)
PROFILE = config.get('profile', 'quick')
RUNS = read_profile(PROFILE)
NOTEBOOK = f'papermill_runs/{PROFILE}/{{run}}.ipynb'
RESULT = f'papermill_runs/{PROFILE}/{{run}}.json'
MODEL = f'build/{PROFILE}/{{run}}'

def models_of(run):
    "The models of this grid that a run reads; others are folders, or on the hub."
    return [MODEL.format(run=r) for r in RUNS[run].needs if r in RUNS]

def results_for(run):
    "The report reads every other result, and so comes last."
    if RUNS[run].method != 'report': return []
    return [RESULT.format(run=r) for r in RUNS if RUNS[r].method != 'report']

# For the line that says how far the grid is
onstart: write_json(models_dir(PROFILE)/'plan.json', [job.wildcards.run for job in workflow.dag.needrun_jobs() if job.rule.name != 'all'])

rule all:
    input: [f.format(run=r) for r in RUNS for f in (NOTEBOOK, RESULT)]

for METHOD in dict.fromkeys(r.method for r in RUNS.values()):
    rule:
        name: METHOD
        # A better embedded model or corpus makes every result stale
        input:
            template=str(template_of(METHOD)),
            base=str(BASE_MODEL/'model.safetensors'), corpus=str(CORPUS/'checksums.json'),
            models=lambda w: models_of(w.run),
            results=lambda w: results_for(w.run)
        output: NOTEBOOK, RESULT, *([] if METHOD in WITHOUT_MODEL else [directory(MODEL)])
        wildcard_constraints: run='|'.join(r.id for r in RUNS.values() if r.method == METHOD)
        params: lambda w: json.dumps(RUNS[w.run].params)
        # On a cluster, a run that must be alone gets a node of its own
        threads: (workflow.cores or 2) if METHOD in ALONE else 1
        resources: **resources(METHOD), **({'slurm_extra': "'--exclusive'"} if METHOD in ALONE else {})
        shell:
            'OMP_NUM_THREADS={threads} {PYTHON} -m codegpt_nbc.runs.warm codegpt_nbc.runs.cli'
            ' run {input.template:q} {output[0]:q} --params {params:q} --no-bar --force'
