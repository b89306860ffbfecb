# The grid. Which runs there are stands in configs/<profile>.yaml; what a run does, in its template notebook.
# Usually called through `make reproduce`, which adds a lock; `snakemake --cores 2 --config profile=quick` works too.
import json, sys
from codegpt_nbc.runs.grid import ALONE, WITHOUT_MODEL, read_profile, resources
from codegpt_nbc.core.paths import BASE_MODEL, CORPUS

PROFILE = config.get('profile', 'quick')
RUNS = read_profile(PROFILE)
NOTEBOOK, RESULT, MODEL = f'papermill_runs/{PROFILE}/{{run}}.ipynb', f'papermill_runs/{PROFILE}/{{run}}.json', f'build/{PROFILE}/{{run}}'

rule all:
    input: [f.format(run=r) for r in RUNS for f in (NOTEBOOK, RESULT)]

for METHOD in dict.fromkeys(r.method for r in RUNS.values()):
    rule:
        name: METHOD
        # A better embedded model or corpus makes every result stale
        input:
            template=f'nbs/experiments/{METHOD}.ipynb',
            base=str(BASE_MODEL/'model.safetensors'), corpus=str(CORPUS/'checksums.json'),
            models=lambda w: [MODEL.format(run=r) for r in RUNS[w.run].needs if r in RUNS],   # others are folders, or on the hub
            # The report reads every other result, and so comes last
            results=lambda w: [RESULT.format(run=r) for r in RUNS if RUNS[r].method != 'report'] if RUNS[w.run].method == 'report' else []
        output: NOTEBOOK, RESULT, *([] if METHOD in WITHOUT_MODEL else [directory(MODEL)])
        wildcard_constraints: run='|'.join(r.id for r in RUNS.values() if r.method == METHOD)
        params: lambda w: json.dumps(RUNS[w.run].params)
        # On a cluster, a run that must be alone gets a node of its own
        threads: (workflow.cores or 2) if METHOD in ALONE else 1
        resources: **resources(METHOD), **({'slurm_extra': "'--exclusive'"} if METHOD in ALONE else {})
        shell: 'OMP_NUM_THREADS={threads} {sys.executable} -m codegpt_nbc.runs.cli run {input.template} {output[0]} --params {params:q}'
