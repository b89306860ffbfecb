"""Students, from a distilled run to a model that comes with the package."""
import pytest
from codegpt_nbc.core.paths import read_json, verify_checksums
from codegpt_nbc.core.record import Recorder
from codegpt_nbc.evidence.evaluate import size_of
from codegpt_nbc.methods.distill import DistillConfig, distill_step, ship_student
from codegpt_nbc.model.folder import load_model, recipe_of


def test_a_distilled_run_becomes_an_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path))
    shape = dict(layers=1, d_model=64, heads=1, d_head=32, inner=64)
    c = DistillConfig(run_id='small', profile='try', codexglue=0, thesis=0, student='random', shape=shape, tokens=512, length=64)
    run, step = Recorder(c, 'distill'), distill_step(c)
    run.add(size=size_of(step.folder), train=step.train, chain=recipe_of(step.folder), details=step.details).save()
    to = ship_student('try', 'small', tmp_path/'shipped')
    verify_checksums(to)
    half, own = (load_model(folder).state_dict() for folder in (to, step.folder))
    assert all((half[name] == t.half()).all() for name, t in own.items())
    assert not (to/'recipe.json').exists()                                   # chains start here
    assert read_json(to/'training.json')['tokens'] == step.train.tokens >= 512
    card = (to/'README.md').read_text(encoding='utf-8')
    assert '1 layers of 1 heads and 64 neurons' in card and step.train.processor in card and 'random weights' in card
    ship_student('try', 'small', to)                                         # again
    (to/'mine.txt').write_text('')
    with pytest.raises(FileExistsError, match='mine.txt'): ship_student('try', 'small', to)
