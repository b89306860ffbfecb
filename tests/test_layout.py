"""The wings of the package: each imports only from itself and from those above it, and no module from one that comes back to it."""
import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
import pytest

PACKAGE = Path(__file__).resolve().parent.parent/'codegpt_nbc'
WINGS = ['core', 'data', 'model', 'methods', 'engines', 'evidence', 'runs', 'report']
FILES = [p for p in sorted(PACKAGE.rglob('*.py')) if p.stem not in ('__init__', '_modidx')]
MODULES = {'.'.join(p.relative_to(PACKAGE).with_suffix('').parts): p for p in FILES}


def imports(name: str, tree: ast.AST):
    "Yield the modules of this package that a module imports, at the top or within a function."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix('codegpt_nbc.') for a in node.names if a.name.startswith('codegpt_nbc.'))
        if isinstance(node, ast.ImportFrom):
            here = ['codegpt_nbc', *name.split('.')]
            origin = '.'.join((here[:-node.level] if node.level else []) + ([node.module] if node.module else []))
            if not origin.startswith('codegpt_nbc'): continue
            origin = origin.removeprefix('codegpt_nbc').lstrip('.')
            if origin in MODULES: yield origin
            else:
                names = [f'{origin}.{a.name}'.lstrip('.') for a in node.names]
                yield from (name for name in names if name in MODULES)


IMPORTS = {name: sorted(set(imports(name, ast.parse(path.read_text(encoding='utf-8'))))) for name, path in MODULES.items()}


def test_every_module_is_in_a_wing():
    assert [m for m in MODULES if m.split('.')[0] not in WINGS] == []


@pytest.mark.parametrize('name', MODULES)
def test_no_import_climbs(name):
    def wing(m): return WINGS.index(m.split('.')[0])
    climbing = [f'{name} → {m}' for m in IMPORTS[name] if wing(m) > wing(name)]
    assert climbing == [], f'the wings are, from first to last: {", ".join(WINGS)}'


def test_no_imports_in_a_circle():
    try: list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as e: pytest.fail(' → '.join(e.args[1]))
