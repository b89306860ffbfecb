"""The order of the tests' files for few workers, each of which takes whole files: the longest first.

xdist would begin with the files of most tests. The few that run grids, a minute each, would be left for the end,
when one worker has nothing to do.
"""
FIRST = ('test_families', 'test_wheel', 'test_contributing', 'test_family_engines', 'test_kills', 'test_grid', 'test_raw', 'test_protocols',
         'test_force', 'test_fuzz')


def pytest_collection_modifyitems(items):
    def place(item): return FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST)
    items.sort(key=place)
