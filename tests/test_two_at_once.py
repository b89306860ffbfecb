"""What editors and programs do to a model: several answers at a time, source that names control tokens, ends of files and of lines."""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
sys.path.insert(0, str(Path(__file__).parent))
from test_raw import ENGINES, RAW, folder_that_fills_in
from codegpt_nbc import compress, load
from codegpt_nbc.data.raw_text import RawText
from codegpt_nbc.data.raw_words import last_line, open_at_end
from codegpt_nbc.data.tokenizer import load_tokenizer
from codegpt_nbc.engines.completion import UntilStatement, complete_raw, stream_raw

PROMPTS = ['def read(path):\n    with open(path) as f:\n        data = ', 'class A:\n    def __init__(self, name, value):\n        self.',
           'import os\nfor name in os.', 'def f(a, b):\n    return ']


@pytest.fixture(scope='module', params=['torch', 'onnx'])
def model(request, tmp_path_factory):
    if request.param == 'torch': return load()
    out = tmp_path_factory.mktemp('small')/'int8'
    return load(compress('codegpt-nano', 'int8', out, progress=False, budgets={'onnx': {'compare': 2}}))


def test_threads_share_a_model(model):
    want = [model.complete(p) for p in PROMPTS]
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(model.complete, PROMPTS*3))
    assert got == want*3


def test_a_stream_goes_on_where_the_model_was_used_meanwhile():
    raw, engine = next(iter(RAW.values())), next(iter(ENGINES.values()))
    want = complete_raw(engine, raw, PROMPTS[:2], 12, 'end')
    streams, got = [stream_raw(engine, raw, p, 12, 'end') for p in PROMPTS[:2]], ['', '']
    for _ in range(12):
        for i, stream in enumerate(streams): got[i] += next(stream, '')
    assert got == want


def test_a_session_is_at_one_answer_at_a_time():
    session = load().session()
    raw = session.raw_text
    first = stream_raw(session.engine, raw, PROMPTS[0], 12, 'end')
    assert next(first)
    whole = ''.join(stream_raw(session.engine, raw, PROMPTS[1], 12, 'end'))
    with pytest.raises(RuntimeError, match='give each a session of its own'): list(first)
    assert whole == ''.join(stream_raw(load().engine, raw, PROMPTS[1], 12, 'end'))


# Source

@pytest.mark.parametrize('word', ['</s>', '<s>', '<pad>'])
def test_nothing_that_ends_or_begins_a_text_is_written_into_source(word, monkeypatch):
    model = load()
    end = model.tokenizer.token_to_id(word)
    kept = type(model.engine).prefill
    def ends(self, ids, lengths): # the word is the most probable one
        logits = kept(self, ids, lengths)
        logits[:, end] = logits.max() + 1
        return logits
    monkeypatch.setattr(type(model.engine), 'prefill', ends)
    assert model.complete('def main():\n    pass\n\n\nif __name__ == "__main__":\n    main()') == ''


@pytest.mark.parametrize('split', [0, 1, 2, 3])
def test_a_statement_goes_on_behind_a_backslash_whatever_ends_its_line(split):
    for whole in (b'b + \\\r\n    2', b'b + \\\n    2', b'"a\\\r\nb"'):
        text = whole + b'\r\ny'
        at = text.index(b'\\') + split
        until, before, got = UntilStatement('x = '), b'', b''
        for piece in (text[:at], text[at:]):
            end = until(before, piece)
            got += piece[:end]
            before += piece
            if end is not None: break
        assert got == whole


def last_line_by_rescanning(source):
    def line_at(position): return max(source.rfind(end, 0, position) for end in '\r\n') + 1
    at = line_at(len(source))
    while (found := open_at_end(source[:at]))[0] == 'string': at = line_at(found[1])
    return at


PARTS = ['"""', "'''", '"', "'", '\\', '\n', '\r\n', '\r', 'a', '(', ')', '#', ' ', 'b', 'x = ']

@given(st.lists(st.sampled_from(PARTS), max_size=30).map(''.join))
@settings(max_examples=400, deadline=None)
def test_the_last_line_is_found_in_one_pass(source): assert last_line(source) == last_line_by_rescanning(source)


def test_strings_that_chain_lines_take_no_longer_each():
    calls = []
    class Counted(str):
        def startswith(self, *args):
            calls.append(1)
            return super().startswith(*args)
    def work(lines):
        calls.clear()
        last_line(Counted('x = "a\\\nb"\n'*lines))
        return len(calls)
    assert work(800) <= 2*work(400) + 2


def test_source_that_names_control_tokens_is_source(tmp_path_factory):
    folder = folder_that_fills_in(tmp_path_factory)
    raw = RawText(load_tokenizer(folder), folder)
    infill, gap = raw.infill, {raw.infill.before_prefix, raw.infill.before_suffix, raw.infill.before_answer}
    for name in gap:
        prefix, suffix = f'A = "{name}"\nx = ', f'\nB = "{name}"\n'
        read = raw.prompts([prefix], 200, 0, [suffix])[0]
        controls = [raw.tok.id_to_token(i) for i in read.ids if raw.tok.id_to_token(i) in gap]
        assert controls == [infill.before_prefix, infill.before_suffix, infill.before_answer]
        assert prefix.encode() in b''.join(map(raw.spells, read.ids))
    by_hand = f'{infill.before_prefix}x = {infill.before_suffix}\n{infill.before_answer}'
    assert raw.prompts([by_hand], 200, 0)[0].ids[0] == raw.tok.token_to_id(infill.before_prefix)


def test_each_prompt_has_its_suffix():
    raw, engine = next(iter(RAW.values())), next(iter(ENGINES.values()))
    with pytest.raises(ValueError, match='2 prompts have 1 suffixes'): complete_raw(engine, raw, ['a = ', 'b = '], 4, suffixes=[None])
