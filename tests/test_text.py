"""Text as it comes: `spell_out` writes Python's own tokens on every version of Python, and files are read as Python reads them.

These tests need no PyTorch; tests/test_pythons.py runs them under other versions of Python, too.
`CODEGPT_NBC_FUZZ=10000` tries so many sources."""
import ast, io, json, os, re, sys, tokenize, warnings
import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from codegpt_nbc.data.codexglue import code_lines, line_completion_samples
from codegpt_nbc.data.corpus import SourceFile, read_both
from codegpt_nbc.data.text_format import Literals, abstract, spell_out

N = int(os.environ.get('CODEGPT_NBC_FUZZ', 150))
TRY = settings(max_examples=N, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
SEPARATORS = ['\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\x85', '\u2028', '\u2029']   # where `str.splitlines` cuts and Python does not
ENDS = ['\n', '\r\n', '\r']


def read_back(token: str) -> str:
    "The Python token that a spelled-out token stands for, blanks in strings as single ones."
    if m := re.fullmatch(r'<NUM_LIT:(.*)>', token): return m[1]
    m = re.fullmatch(r'([a-z]*(?:\'\'\'|"""|\'|")?)<STR_LIT:(.*)>(\'\'\'|"""|\'|"|)', token)
    return m[1] + m[2].replace('U+0020', ' ').replace('U+002C', ',') + m[3] if m else token


def lines_of(spelled: str) -> list: return [[read_back(t) for t in line.split(' ')] for line in spelled.split(' <EOL> ')] if spelled else []


# Generated sources, whose tokens are known from how they were made

NAMES = st.sampled_from(['a', 'size', 'é', 'naïve', '变量', 'º', 'ª1', '℘', '℘x', 'b·c', 'µ2', '_', 'print', 'f', 'rb'])
NUMBERS = st.sampled_from(['0', '1', '1_000', '0xFF', '1.5e-3', '.5', '2j', '0b11'])
PIECES = ['a', 'é', ',', ' ', '<', '>', '#', '变', '\\\\', '\\n', '<EOL>', '\t', 'x y', *SEPARATORS]
CONTENT = st.lists(st.sampled_from(PIECES), max_size=6).map(''.join)
BITS = ['a', 'é', '1', ' ', '\n', '    ', '\t', '(', ')', '[', ']', ':', ',', '.', '=', 'if ', 'in ', '"', "'", '"""', 'b"', '#', '\\\n',
        '\x0c', '-', '{', '}', *SEPARATORS]
GAPS = ['', '\n', '\x0c\n', '   \n', '# \u2028\n']                 # between two statements
HEADS = [b'', b'\xef\xbb\xbf', *(f'# coding: {name}\n'.encode() for name in ('latin-1', 'utf-7', 'utf-16', 'idna', 'unicode_escape'))]


@st.composite
def strings(draw):
    "A string literal on one line or, in triple quotes, on several."
    quote = draw(st.sampled_from(["'", '"', "'''", '"""']))
    body = draw(CONTENT) + (draw(st.sampled_from(['', '\n', '\n  ', '\\\n'])) + draw(CONTENT) if len(quote) == 3 else '')
    prefix = draw(st.sampled_from(['', 'r', 'b', 'rb', 'u']))
    if 'b' in prefix: body = body.encode('ascii', 'ignore').decode()
    return prefix + quote + body + quote


@st.composite
def f_strings(draw, depth=0):
    "An f-string, perhaps with one inside, in quotes of another kind as Python 3.11 wants it."
    quote = '"' if depth else "'"
    inner = st.sampled_from(['a', 'é + 1', 'b·c!r', 'a:>{w}', 'x[0]', 'd["k"]' if quote == "'" else "x.y"])
    if not depth: inner |= f_strings(1)
    plain = CONTENT.map(lambda s: s.replace('\\n', '').replace('\\\\', ''))
    part = plain | inner.map('{{{}}}'.format) | st.sampled_from(['{{', '}}', '{{{a}}}'])
    parts = draw(st.lists(part, min_size=1, max_size=4))
    return 'f' + quote + ''.join(parts) + quote


@st.composite
def statements(draw):
    "(source lines without line end, tokens)"
    atom = NAMES | NUMBERS | strings() | f_strings()
    tokens = [draw(NAMES), '='] + [draw(atom)]
    for _ in range(draw(st.integers(0, 3))): tokens += [draw(st.sampled_from(['+', '-', ',', '==', '@', '**'])), draw(atom)]
    blank = st.sampled_from([' ', '  ', '\t', ' \x0c', ' \\\n '])
    text = tokens[0] + ''.join(draw(blank) + t for t in tokens[1:])
    return text + draw(st.sampled_from(['', '  # note', *(f'  # {s} é' for s in SEPARATORS)])), tokens


@TRY
@given(made=st.lists(statements(), min_size=1, max_size=5), end=st.sampled_from(ENDS), mark=st.booleans(), last=st.booleans(),
       nested=st.sampled_from(['', ' ', '\t', '        ']), gap=st.sampled_from(GAPS))
def test_what_is_written_reads_back_as_the_tokens_that_were_there(made, end, mark, last, nested, gap):
    body = ('\n' + gap).join(nested + text for text, _ in made)
    source = ('if x:\n' if nested else '') + body + ('\n' if last else '')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: ast.parse(source)
        except SyntaxError: assume(False)
    want = ([['if', 'x', ':']] if nested else []) + [[' '.join(t.split()) for t in tokens] for _, tokens in made]
    spelled = spell_out('\ufeff'*mark + source.replace('\n', end))
    assert not set(spelled) & {'\n', '\r', '\t', *SEPARATORS}
    assert lines_of(spelled) == want


@TRY
@given(source=st.lists(st.sampled_from(BITS), max_size=25).map(''.join))
def test_whatever_parses_gives_pythons_own_tokens(source):
    "Against `tokenize` itself, for source without f-strings, whose tokens it gives alike on every version."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError): return
    want, line = [], []
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type in (tokenize.NEWLINE, tokenize.NL): want, line = want + [line]*bool(line), []
        elif t.type not in (tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER): line.append(' '.join(t.string.split()))
    assert lines_of(spell_out(source)) == want + [line]*bool(line)


@TRY
@given(text=st.text(max_size=40))
def test_a_finished_line_is_one_line(text):
    try: spelled = spell_out(text)
    except (SyntaxError, tokenize.TokenError, ValueError): return
    line = abstract(spelled, Literals(frozenset(), frozenset()))
    assert len(line.splitlines()) == 1


# Files

LINES = '\n'.join(f'x{i} = {i}' for i in range(7))
SPELLED = ' <EOL> '.join(f'x{i} = <NUM_LIT:{i}>' for i in range(7))


def read(tmp_path, data: bytes) -> tuple:
    file = tmp_path/'a.py'
    file.write_bytes(data)
    return read_both(SourceFile('p', '', '', 'a.py', str(file)))[1:]


@pytest.mark.parametrize('end', ENDS)
@pytest.mark.parametrize('encoding, head', [
    ('utf-8', ''), ('utf-8-sig', ''), ('latin-1', '# -*- coding: latin-1 -*-\n'), ('utf-8-sig', '# coding: utf-8\n'),
    ('cp1252', '#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\n')])
def test_encodings_and_line_ends_are_read_as_python_reads_them(tmp_path, encoding, head, end):
    source = f"{head}é = 'ü'\n{LINES}\n"
    assert read(tmp_path, source.replace('\n', end).encode(encoding)) == (f"é = '<STR_LIT:ü>' <EOL> {SPELLED}", '')


@pytest.mark.parametrize('data, why', [
    (f'{LINES}\nprint "x"\n'.encode(), 'does not parse'),                       # Python 2
    (f'{LINES}\nexcept ValueError, e: raise\n'.encode(), 'does not parse'),
    (f'{LINES}\nx = 0777L\n'.encode(), 'does not parse'),
    (f'%matplotlib inline\n{LINES}\n'.encode(), 'does not parse'),              # a notebook's magic
    (f'{LINES}\n!ls\n'.encode(), 'does not parse'),
    (f'{LINES}\nx = "a\0b"\n'.encode(), 'does not parse'),
    (f'{LINES}\n\0\n'.encode(), 'does not parse'),
    (f'if x:\n\ty = 1\n        z = 2\n{LINES}\n'.encode(), 'does not parse'),   # tabs and blanks mixed
    (f'x = "é"\n{LINES}\n'.encode('latin-1'), 'wrong encoding'),                # no coding line
    ((f'{LINES}\n'*30 + 'x = "é"\n').encode('latin-1'), 'wrong encoding'),
    (f'# coding: latin-9000\n{LINES}\n'.encode(), 'wrong encoding'),
    (f'# coding: rot13\n{LINES}\n'.encode(), 'wrong encoding'),
    (f'{LINES}\n'.encode('utf-16'), 'wrong encoding'),
    (b'\xef\xbb\xbf# coding: latin-1\n' + LINES.encode(), 'wrong encoding'),    # a byte order mark of another encoding
    (f'x = "{"a"*2000}"\n{LINES}\n'.encode(), 'machine-made'),
    (('x = "' + 'a'*600 + '\x0c' + 'a'*600 + f'"\n{LINES}\n').encode(), 'machine-made'),   # a form feed ends no line
    (f'{LINES}\nx = {"("*3000}1{")"*3000}\n'.encode(), 'machine-made'),
    (('(\n'*600 + '1' + ')\n'*600 + LINES).encode(), 'does not parse'),         # too many nested parentheses
    (b'', 'under six lines'), (b'\xef\xbb\xbf', 'under six lines'), (b'\n'*50, 'under six lines'),
])
def test_what_is_skipped_has_its_reason(tmp_path, data, why):
    assert read(tmp_path, data) == (None, why)


@TRY
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(lambda s: s.encode('utf-8', 'replace')), head=st.sampled_from(HEADS))
def test_no_file_stops_the_reading_of_the_others(data, head, tmp_path_factory):
    text, why = read(tmp_path_factory.mktemp('s'), head + LINES.encode() + b'\n' + data)
    assert (text is None) == bool(why)


# JSON lines and published lines end at newlines alone

@TRY
@given(rows=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=5), mark=st.booleans(), plain=st.booleans(),
       end=st.sampled_from(['\n', '\r\n']))
def test_json_lines_are_split_at_newlines_only(rows, mark, plain, end, tmp_path_factory):
    file = tmp_path_factory.mktemp('j')/'test.json'
    text = ''.join(json.dumps({'id': i, 'input': f'<s> {a}', 'gt': b}, ensure_ascii=not plain) + end for i, (a, b) in enumerate(rows))
    file.write_bytes(('\ufeff'*mark + text).encode())
    found = line_completion_samples(file)
    assert found['input'].tolist() == [f'<s> {a}'.strip() for a, _ in rows] and found['gt'].tolist() == [b.strip() for _, b in rows]


@TRY
@given(files=st.lists(CONTENT, min_size=1, max_size=5), mark=st.booleans(), end=st.sampled_from(['\n', '\r\n']))
def test_published_files_are_split_at_newlines_only(files, mark, end, tmp_path_factory):
    folder = tmp_path_factory.mktemp('c')
    lines = [f'<s> a <EOL> {text} </s>' for text in files]
    (folder/'train.txt').write_bytes(('\ufeff'*mark + end.join(lines) + end).encode())
    assert list(code_lines(folder, 'train')) == lines


def test_nothing_of_this_imports_pytorch():
    "In a process of its own, as other tests do import it."
    import subprocess
    from pathlib import Path
    rooms = ['core.paths', 'core.config', 'core.record', 'data.text_format', 'data.corpus', 'data.samples', 'data.freeze',
             'data.codexglue', 'data.tokenizer', 'data.inputs', 'evidence.metrics', 'runs.grid']
    code = 'import sys\n' + '\n'.join(f'import codegpt_nbc.{room}' for room in rooms)
    code += "\nprint(sorted({'torch', 'onnxruntime', 'transformers', 'accelerate'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'
