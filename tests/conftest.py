"""The order of the tests' files for few workers, each of which takes whole files: the longest first.

xdist would begin with the files of most tests. The few that run grids, a minute each, would be left for the end,
when one worker has nothing to do.
"""
import pytest

FIRST = ('test_budget', 'test_families', 'test_wheel', 'test_family_engines', 'test_grid', 'test_systems', 'test_kills', 'test_docs',
         'test_protocols', 'test_contributing', 'test_force', 'test_interop', 'test_raw', 'test_engines', 'test_fuzz', 'test_serve')


def pytest_collection_modifyitems(items):
    def place(item): return FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST)
    items.sort(key=place)


@pytest.fixture
def home(tmp_path_factory, monkeypatch):
    "A place for what a test makes: its keys hold temporary paths, so in the checkout it would stay, and never be found again."
    place = tmp_path_factory.mktemp('home')
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(place))
    return place
