"""Training in two processes on the CPU (gloo) is training in one: the same losses, one checkpoint, one progress bar."""
import json, os, subprocess, sys

SCRIPT = """
import json, sys, torch
from pathlib import Path
from accelerate import PartialState
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.layers import Shape
from codegpt_nbc.model.train import Samples, TrainConfig, fit
out = Path(sys.argv[1])
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
lengths = torch.randint(4, 30, (17,), generator=g)   # uneven, and a last batch of one row
rows = [torch.randint(64, (int(n),), generator=g).tolist() for n in lengths]
held = torch.randint(64, (8, 20), generator=g)
model, seen = Decoder(Shape(64, 32, 16, 4, (4, 4), (64, 64))).init_weights(), []
config = TrainConfig(steps=20, lr=1e-2, precision='fp32')
r = fit(model, Samples(rows, 4, 32), config, observe=lambda r: seen.append(r.step), checkpoint=out/'checkpoint',
        checkpoint_s=0., desc='two')
state = PartialState()
found = dict(curve=r.curve, tokens=r.tokens, step=r.step, seen=len(seen), processes=state.num_processes,
             after=float(model(held[:, :-1], held[:, 1:]).detach()),
             weights=[p.double().sum().item() for p in model.parameters()])
(out/f'{state.process_index}.json').write_text(json.dumps(found))
"""


def train(tmp_path, processes):
    out = tmp_path/str(processes)
    out.mkdir()
    (tmp_path/'train.py').write_text(SCRIPT, encoding='utf-8')
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]   # as `accelerate launch`
    if processes == 1: launch = []
    env = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    p = subprocess.run([sys.executable, *launch, str(tmp_path/'train.py'), str(out)], capture_output=True, text=True, env=env, timeout=300)
    assert p.returncode == 0, p.stderr[-3000:]
    return [json.loads((out/f'{i}.json').read_text(encoding='utf-8')) for i in range(processes)], out, p.stderr


def test_two_processes_are_one(tmp_path):
    (one,), _, _ = train(tmp_path, 1)
    two, out, said = train(tmp_path, 2)
    close = lambda a, b: all(abs(x - y) < 1e-4*max(1, abs(x)) for x, y in zip(a, b, strict=True))
    for r in two:
        assert (r['processes'], r['step'], r['tokens']) == (2, 20, one['tokens'])
        assert [t for t, _ in r['curve']] == [t for t, _ in one['curve']]
        assert close([loss for _, loss in one['curve']], [loss for _, loss in r['curve']])
        assert close([one['after']], [r['after']])
    assert two[0]['weights'] == two[1]['weights'], 'both hold the same model'
    assert [r['seen'] for r in two] == [20, 0], 'the main process alone looks at the model on the way'
    left = sorted(p.name for p in (out/'checkpoint').iterdir())
    assert left == ['.codegpt_nbc.json', 'state.json', 'state.safetensors'] and not list(out.glob('.tmp-*'))
    bars = [l for l in said.replace('\r', '\n').splitlines() if l.startswith('two: 100%')]
    assert len(bars) == 1, said[-1000:]
