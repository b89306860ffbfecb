"""The editor's server over real connections, and what sessions write: the same as without a cache."""
import asyncio, json, os, re, signal, socket, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
sys.path.insert(0, str(Path(__file__).parent))
from test_raw import ENGINES, RAW, SLOW, TEXT, TOKENIZERS, folder_that_fills_in
from test_rare import tiny
from codegpt_nbc import load
from codegpt_nbc.data.raw_text import INFILLS, RawText
from codegpt_nbc.data.tokenizer import load_tokenizer
from codegpt_nbc.engines.completion import complete_raw, complete_source, stream_raw
from codegpt_nbc.engines.generate import Sampled, Truncated
from codegpt_nbc.engines.onnx_export import export_onnx
from codegpt_nbc.engines.onnx_run import OrtEngine
from codegpt_nbc.engines.session import Cached, Prefixes, PromptLookup

MISSING = [name for name in ('fastapi', 'uvicorn', 'httpx', 'prometheus_client') if not find_spec(name)]
needs_server = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install '.[serve]' httpx")
pytestmark = pytest.mark.filterwarnings(f'ignore::{Truncated.__module__}.Truncated')


# Sessions

TYPED = ['', 'x', 'self.', '\n    ', 'é🙂', 'return a\n', 'def f(', '"']
EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 40), st.sampled_from(TYPED)), min_size=2, max_size=5)
FEW = settings(SLOW, max_examples=8)


def edited(edits, text=TEXT[:500]):
    "A text after each edit, up to the edit's end."
    for at, gone, new in edits:
        text = text[:at] + new + text[at + gone:]
        yield text[:at + len(new)]


@pytest.mark.parametrize('drafts', [None, PromptLookup()], ids=['plain', 'drafts'])
@pytest.mark.parametrize('name', TOKENIZERS)
@given(edits=EDITS, stop=st.sampled_from(['line', 'statement', 'end']), block=st.sampled_from([1, None]))
@FEW
def test_a_session_of_raw_source_writes_what_no_cache_writes(name, drafts, edits, stop, block):
    raw, engine = RAW[name], ENGINES[name]
    kept = Prefixes(engine, 2**16, drafts)
    for text in edited(edits):
        want = complete_raw(engine, raw, [text], 6, stop, block=block)
        assert complete_raw(kept, raw, [text], 6, stop, block=block) == want
    assert [''.join(stream_raw(kept, raw, text, 6, stop, block=block))] == want


@pytest.fixture(scope='module')
def words(): return load()


@given(edits=EDITS)
@FEW
def test_a_session_of_converted_source_writes_what_no_cache_writes(words, edits):
    kept = Prefixes(words.engine, 2**24)
    for text in edited(edits, TEXT[3000:3500]):
        try: want = complete_source(words.engine, words.raw_text, [text], 4, block=None)
        except ValueError as e:
            with pytest.raises(ValueError, match=re.escape(str(e))): complete_source(kept, words.raw_text, [text], 4, block=None)
        else: assert complete_source(kept, words.raw_text, [text], 4, block=None) == want


def test_a_long_text_that_grows_stays_in_the_cache():
    raw, engine, read, moves = RAW['byte-level'], ENGINES['byte-level'], {}, {}
    for block in (1, None):
        kept = Prefixes(engine, 2**20)
        for end in range(3000, 3400, 8): complete_raw(kept, raw, [TEXT[:end]], 4, block=block)
        read[block], moves[block] = sum(w.read for w in kept.works), sum(w.reused == 0 for w in kept.works)
    assert read[None] < .5*read[1] and moves[None] < moves[1], (read, moves)


def test_an_interruption_harms_no_cache():
    raw, engine, left = RAW['byte-level'], ENGINES['byte-level'], [3]
    def check():
        left[0] -= 1
        if left[0] == 0: raise InterruptedError
    kept = Prefixes(engine, 2**20, check=check)
    with pytest.raises(InterruptedError): complete_raw(kept, raw, [TEXT[:200]], 8, 'end')
    assert complete_raw(kept, raw, [TEXT[:210]], 8, 'end') == complete_raw(engine, raw, [TEXT[:210]], 8, 'end')
    assert kept.works[-1].reused > 40
    row = Cached(engine)
    complete_raw(row, raw, [TEXT[:200]], 8, 'end')
    row.engine.extend = lambda *_: 1/0
    with pytest.raises(ZeroDivisionError): complete_raw(row, raw, [TEXT[:220]], 8, 'end')
    del row.engine.extend
    assert complete_raw(row, raw, [TEXT[:220]], 8, 'end') == complete_raw(engine, raw, [TEXT[:220]], 8, 'end')


def test_an_interruption_while_a_cache_grows_harms_no_row(tmp_path, monkeypatch):
    folder = export_onnx(tiny(tmp_path/'model', context=256), tmp_path/'onnx', 'fp32')
    engine, raw = OrtEngine(folder), RawText(load_tokenizer(folder))
    row, short, long = Cached(engine), 'x = 1\n'*3, 'x = 1\n'*20
    complete_source(row, raw, [short], 4)
    class Interrupted:
        def __init__(self, *_): raise KeyboardInterrupt
    with monkeypatch.context() as during:
        during.setattr('codegpt_nbc.engines.onnx_run._Bound', Interrupted)
        with pytest.raises(KeyboardInterrupt): complete_source(row, raw, [long], 4)
    assert complete_source(row, raw, [long], 4) == complete_source(engine, raw, [long], 4)


@pytest.mark.parametrize('length', [10, 40, 63, 64, 80, 130])
@pytest.mark.parametrize('max_new', [48, 490])
def test_an_answer_begins_with_the_name_that_was_typed(length, max_new, words, monkeypatch):
    lines = []
    def answer_source(cursor, line):
        lines.append((cursor.typed, line))
        return ''
    monkeypatch.setattr('codegpt_nbc.engines.completion.answer_source', answer_source)
    name = ('collect_the_measurements_of_' + 'every_other_'*20)[:length]
    words.complete(f'def {name}er(path):\n    return path\n\n\nfiles = {name}', max_new=max_new)
    (typed, line), = lines
    assert typed == name and line.startswith(typed)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system forks no processes')
def test_a_forked_process_answers():
    code = """import multiprocessing, torch
from codegpt_nbc import load
torch.set_num_threads(2)
model = load()
def answer(_): return model.complete('import os\\n\\ndef read(path):\\n    return os.', max_new=4)
if __name__ == '__main__':
    here = answer(0)
    with multiprocessing.get_context('fork').Pool(1) as pool: assert pool.map_async(answer, [0]).get(100) == [here]
"""
    subprocess.run([sys.executable, '-c', code], check=True, timeout=200, env=os.environ | {'OMP_NUM_THREADS': '2'})


def test_memory_is_bounded_and_the_text_used_last_is_kept():
    raw, engine = RAW['byte-level'], ENGINES['byte-level']
    one = Cached(engine).bytes*200//64
    kept, texts = Prefixes(engine, 3*one), [f'# {i}\n' + TEXT[500*i:][:400] for i in range(8)]
    for text in (*texts, texts[7], texts[0]):
        complete_raw(kept, raw, [text], 8)
        assert kept.bytes <= kept.memory or len(kept.rows) == 1
    assert kept.works[-2].reused > 0 == kept.works[-1].reused


def test_chance_is_repeated_with_its_seed():
    raw, engine = RAW['byte-level'], ENGINES['byte-level']
    def drawn(seed, t=3.): return complete_raw(Sampled(Prefixes(engine, 2**20), t, seed), raw, [TEXT[:100]], 8, 'end')[0]
    assert drawn(1) == drawn(1) and len({drawn(seed) for seed in range(6)}) > 3
    assert drawn(1, 1e-9) == complete_raw(engine, raw, [TEXT[:100]], 8, 'end')[0]


# The server

if not MISSING:
    import httpx
    from codegpt_nbc.runs.serve import Job, Server, Settings, Worker, _events, cut, served


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return folder_that_fills_in(tmp_path_factory)


@pytest.fixture(scope='module')
def raw(folder): return load(folder)


@pytest.fixture(scope='module')
def slow(folder):
    "The same, with a delay before each token."
    model = load(folder)
    class Slow(type(model.engine)):
        def extend(self, *args):
            time.sleep(.03)
            return super().extend(*args)
    model.engine.__class__ = Slow
    return model


@contextmanager
def client_of(model, headers=None, **how):
    with served(model, **how) as (address, worker), httpx.Client(base_url=address, headers=headers, timeout=30) as client:
        client.worker = worker
        yield client


@pytest.fixture(scope='module')
def client(raw):
    with client_of(raw) as client: yield client


@pytest.fixture(scope='module')
def words_client(words):
    with client_of(words) as client: yield client


def function(model, prompt, max_new, suffix=None, stops=()):
    "The answer without server or cache."
    rule = 'end' if model.reads == 'raw' else 'line'
    if model.reads == 'raw': text = complete_raw(model.engine, model.raw_text, [prompt], max_new, rule, [suffix], block=None)[0]
    else: text = complete_source(model.engine, model.raw_text, [prompt], max_new, block=None)[0]
    return cut(text, stops)[0] if any(s in text for s in stops) else text


def complete(client, prompt, max_tokens=8, **how):
    answer = client.post('/v1/completions', json=dict(prompt=prompt, max_tokens=max_tokens, **how))
    assert answer.status_code == 200, answer.text
    return answer.json()


PROMPTS = ['', 'import os\n\ndef f(x):\n    retu', TEXT[:300], TEXT[:2000], 'größe = "é', '    ']


@needs_server
def test_answers_are_those_of_the_function(client, words_client, raw, words):
    for prompt in PROMPTS * 2: assert complete(client, prompt)['choices'][0]['text'] == function(raw, prompt, 8)
    for prompt in ('import os\n\ndef f(x):\n    retu', 'x = [', ''):
        assert complete(words_client, prompt)['choices'][0]['text'] == function(words, prompt, 8)
    many = complete(client, PROMPTS, 5)
    assert [c['text'] for c in many['choices']] == [function(raw, p, 5) for p in PROMPTS]
    assert [c['index'] for c in many['choices']] == list(range(len(PROMPTS)))
    filled = complete(client, 'def f(', suffix='):\n    return x\n')
    assert filled['choices'][0]['text'] == function(raw, 'def f(', 8, '):\n    return x\n')
    one = complete(client, TEXT[:300], 6)
    usage = one['usage']
    assert usage['completion_tokens'] <= 6 and usage['total_tokens'] == usage['prompt_tokens'] + usage['completion_tokens']
    assert complete(client, TEXT[:300], 6)['usage']['prompt_tokens_details']['cached_tokens'] == usage['prompt_tokens']
    assert one['choices'][0]['finish_reason'] in ('stop', 'length') and one['model'] == raw.folder.name


@needs_server
def test_stops_end_an_answer_wherever_they_are(client, raw):
    whole = function(raw, TEXT[:300], 24)
    for stops in ([whole[3:5]], [whole[7:9], whole[5:8]], 'never to be seen', [whole[:1]], []):
        given = [stops] if isinstance(stops, str) else stops
        answer = complete(client, TEXT[:300], 24, stop=stops)['choices'][0]
        assert answer['text'] == function(raw, TEXT[:300], 24, stops=given)
        if any(s in whole for s in given): assert answer['finish_reason'] == 'stop'
        streamed = stream(client, '/v1/completions', prompt=TEXT[:300], max_tokens=24, stop=stops)[0]
        assert ''.join(c['choices'][0]['text'] for c in streamed) == answer['text']


@pytest.mark.skipif(bool(MISSING), reason='see needs_server')
@given(text=st.text('ab\n', max_size=12), stops=st.lists(st.text('ab\n', min_size=1, max_size=3), max_size=3))
@SLOW
def test_a_stop_is_found_however_the_answer_is_cut(text, stops):
    def in_pieces(n):
        sent, held = '', ''
        for i in range(0, len(text), n):
            send, held, ended = cut(held + text[i:i+n], stops)
            sent += send
            if ended: return sent
        return sent + held
    ends = [(text.index(s) + len(s), text.index(s)) for s in stops if s in text]
    want = text[:min(ends)[1]] if ends else text
    assert [in_pieces(n) for n in (1, 2, 20)] == [want]*3


def stream(client, path, **asked):
    "The events of a stream, and its last line."
    with client.stream('POST', path, json=dict(stream=True, **asked)) as answer:
        assert answer.status_code == 200 and answer.headers['content-type'].startswith('text/event-stream')
        lines = [line.removeprefix('data: ') for line in answer.iter_lines() if line]
    return [json.loads(line) for line in lines if line != '[DONE]'], lines[-1]


@needs_server
def test_a_stream_is_the_whole_answer(client, words_client, raw, words):
    for one, model in ((client, raw), (words_client, words)):
        for prompt in ('import os\n\ndef f(x):\n    retu', TEXT[:200].rpartition('\n')[0].partition('#')[0] + '\nx = "a'):
            events, last = stream(one, '/v1/completions', prompt=prompt, max_tokens=16, stream_options={'include_usage': True})
            assert last == '[DONE]' and events[-1]['choices'] == [] and events[-1]['usage']['prompt_tokens'] > 0
            assert ''.join(e['choices'][0]['text'] for e in events[:-1]) == function(model, prompt, 16)
            assert [e['choices'][0]['finish_reason'] for e in events[:-1]].count(None) == len(events) - 2
    events, _ = stream(client, '/v1/completions', prompt=['a', 'def '], max_tokens=6)
    for i, prompt in enumerate(['a', 'def ']):
        assert ''.join(c['text'] for e in events for c in e['choices'] if c['index'] == i) == function(raw, prompt, 6)


@needs_server
def test_llamas_interface(client, words_client, raw, words):
    asked = dict(input_prefix='def f(x):\n', prompt='    retu', input_suffix='\n\nf(1)\n', n_predict=7)
    want = function(raw, 'def f(x):\n    retu', 7, '\n\nf(1)\n')
    answer = client.post('/infill', json=asked | dict(top_k=40, samplers=['top_k'], cache_prompt=True, t_max_predict_ms=500)).json()
    assert answer['content'] == want and answer['stop'] is True and answer['tokens_evaluated'] > 0
    events, last = stream(client, '/infill', **asked)
    assert ''.join(e['content'] for e in events) == want and events[-1]['stop'] and not any(e['stop'] for e in events[:-1])
    assert client.post('/completion', json=dict(prompt='def f(', n_predict=5)).json()['content'] == function(raw, 'def f(', 5)
    assert client.post('/infill', json=asked | {'n_predict': 0}).json()['content'] == ''
    long = client.post('/completion', json=dict(prompt='def f(', n_predict=-1)).json()
    assert long['tokens_predicted'] <= raw.engine.context//2
    assert words_client.post('/completion', json=dict(prompt='x = [', n_predict=5)).json()['content'] == function(words, 'x = [', 5)
    assert client.get('/health').json() == {'status': 'ok'}
    assert client.get('/props').json()['default_generation_settings']['n_ctx'] == raw.engine.context
    assert [m['id'] for m in client.get('/v1/models').json()['data']] == [raw.folder.name]
    assert client.get(f'/v1/models/{raw.folder.name}').json()['object'] == 'model'


@needs_server
def test_a_suffix_may_be_ignored(words):
    with client_of(words, ignore_suffix=True) as client:
        assert complete(client, 'x = [', suffix=']')['choices'][0]['text'] == function(words, 'x = [', 8)


@needs_server
def test_temperature_and_seed(client, raw):
    def drawn(seed, t=5.): return complete(client, 'def f(', 12, temperature=t, seed=seed)['choices'][0]['text']
    assert drawn(3) == drawn(3) and len({drawn(seed) for seed in range(5)}) > 2
    assert drawn(None, 0) == function(raw, 'def f(', 12)


@needs_server
def as_written() -> list: # of prompts, as plug-ins write the gap between `a` and `b`
    text = [f'{i.before_prefix}a{i.before_suffix}b{i.before_answer}' for i in INFILLS.values()]
    return text + ['<PRE> a <SUF>b <MID>']      # Code Llama's template; the tokens are spelled with ▁


@needs_server
@pytest.mark.parametrize('prompt', as_written())
def test_a_gap_is_taken_apart_in_the_spelling_of_any_model(prompt):
    from codegpt_nbc.runs.serve import split_gap
    assert split_gap(prompt) == ('a', 'b')


@needs_server
@pytest.mark.parametrize('suffix', [{}, {'suffix': None}, {'suffix': ''}])
def test_an_empty_suffix_leaves_marks_to_be_taken_apart(client, suffix):
    marked = complete(client, '<fim_prefix>x = <fim_suffix>\ny = 2<fim_middle>', **suffix)
    assert marked['choices'] == complete(client, 'x = ', suffix='\ny = 2')['choices']


@needs_server
def test_null_is_a_field_that_was_not_given(client):
    nulls = dict.fromkeys(('stream', 'stop', 'seed', 'temperature', 'n', 'suffix', 'stream_options', 'logprobs'))
    assert complete(client, 'x = ', **nulls)['choices'] == complete(client, 'x = ')['choices']
    by_llama = {'prompt': 'x = ', 'stream': None, 'response_fields': None}
    assert client.post('/completion', json=by_llama | {'n_predict': None}).status_code == 200
    assert client.post('/infill', json=by_llama | {'n_predict': 4, 'input_suffix': None}).status_code == 200


@needs_server
def test_a_body_of_no_content_type_is_told_so(client):
    answer = client.post('/v1/completions', content='{"prompt": "x"}')
    assert answer.status_code == 400 and 'with the header Content-Type: application/json' in answer.json()['error']['message']


def test_who_waits_is_told_that_the_server_closes(slow):
    with ThreadPoolExecutor(2) as pool:
        with client_of(slow) as client:
            url, asked = f'{client.base_url}/v1/completions', dict(prompt='def f(', max_tokens=120)
            two = [pool.submit(httpx.post, url, json=asked) for _ in range(2)]
            assert until_true(lambda: client.worker.job and client.worker.waiting)
        for one in two: is_error(one.result(), 503, 'closing')


def is_error(answer, status, code):
    assert answer.status_code == status, answer.text
    error = answer.json()['error']
    assert set(error) == {'message', 'type', 'code'} and error['code'] == code and '\n' not in error['message'], error
    assert re.search(r'[.:]', error['message']) and 'SECRET' not in answer.text
    return error


@needs_server
@pytest.mark.parametrize('body, status, code', [
    ('{"prompt": "SECRET', 400, 'malformed_json'), ('[]', 400, 'invalid_value'), ('', 400, 'invalid_value'), ('{}', 400, 'invalid_value'),
    ({'prompt': 7}, 400, 'invalid_value'), ({'prompt': ['SECRET', 7]}, 400, 'invalid_value'), ({'prompt': []}, 400, 'invalid_value'),
    ({'prompt': ['x']*17}, 400, 'invalid_value'), ({'prompt': [1, 2]}, 400, 'invalid_value'),
    ({'prompt': 'x', 'max_tokens': 0}, 400, 'invalid_value'), ({'prompt': 'x', 'max_tokens': 'many'}, 400, 'invalid_value'),
    ({'prompt': 'x', 'temperature': -1}, 400, 'invalid_value'), ({'prompt': 'x', 'n': 3}, 400, 'invalid_value'),
    ({'prompt': 'x', 'logprobs': 2}, 400, 'invalid_value'), ({'prompt': 'x', 'stop': ['SECRET']*17}, 400, 'invalid_value'),
    ({'prompt': 'x', 'model': 'gpt'}, 404, 'model_not_found'), ({'prompt': 'x', 'suffix': 'SECRET'}, 400, 'suffix_unsupported'),
    ({'prompt': 'if x:\n        a\n    SECRET\n'}, 400, 'invalid_prompt'), ({'prompt': '# SECRET'}, 400, 'invalid_prompt')])
@pytest.mark.parametrize('streams', [False, True])
def test_a_bad_request_is_answered_and_disturbs_nothing(words_client, words, body, status, code, streams, capfd):
    sent = body if isinstance(body, str) else json.dumps(body | {'stream': streams})
    is_error(words_client.post('/v1/completions', content=sent, headers={'content-type': 'application/json'}), status, code)
    assert complete(words_client, 'x = [')['choices'][0]['text'] == function(words, 'x = [', 8)
    assert 'SECRET' not in ''.join(capfd.readouterr())


@needs_server
def test_other_errors_have_the_same_form(client):
    is_error(client.get('/nowhere'), 404, 'http_error')
    is_error(client.get('/v1/completions'), 405, 'http_error')
    is_error(client.get('/v1/models/other'), 404, 'model_not_found')
    is_error(client.post('/v1/completions', json={'prompt': 'x'*11_000_000}), 413, 'too_large')
    def in_parts():
        for _ in range(40): yield b' '*2**16
    is_error(client.post('/v1/completions', content=in_parts()), 413, 'too_large')
    is_error(client.get('/v1/models', headers={'host': 'elsewhere.example:80'}), 403, 'foreign_host')
    surrogate = client.post('/v1/completions', content=b'{"prompt": "\\ud800"}', headers={'content-type': 'application/json'})
    assert surrogate.status_code in (200, 400)


@needs_server
@pytest.mark.parametrize('error', [KeyError, ValueError])   # NumPy's for shapes that do not fit is a ValueError
def test_a_fault_of_the_program_is_logged_by_its_place(raw, capfd, error):
    def fails(): raise error('SECRET')
    with client_of(raw) as client:
        engine = client.worker.model.engine
        engine.check = fails
        is_error(client.post('/v1/completions', json={'prompt': 'SECRET'}), 500, 'internal_error')
        engine.check = lambda: None
        assert complete(client, 'def f(')['choices'][0]['text'] == function(raw, 'def f(', 8)
    said = ''.join(capfd.readouterr())
    assert f'{error.__name__} at test_serve.py' in said and 'SECRET' not in said


@needs_server
def test_a_token(raw):
    with client_of(raw, token='geheim') as client:
        is_error(client.get('/v1/models'), 401, 'invalid_token')
        is_error(client.post('/infill', json={}, headers={'authorization': 'Bearer other'}), 401, 'invalid_token')
        assert client.get('/health').status_code == 200
        assert client.get('/v1/models', headers={'authorization': 'Bearer geheim', 'host': 'elsewhere'}).status_code == 200
    with client_of(raw, token='geheimnis-ä') as client:   # any characters, as their bytes in UTF-8
        is_error(client.get('/v1/models', headers={'authorization': 'Bearer geheimnis-a'}), 401, 'invalid_token')
        assert client.get('/v1/models', headers={'authorization': 'Bearer geheimnis-ä'.encode()}).status_code == 200


# Clients that go away

def until_true(what, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what(): return True
        time.sleep(.02)
    return False


@needs_server
@pytest.mark.parametrize('streams', [False, True])
def test_a_client_that_goes_away_frees_the_worker(slow, streams):
    with client_of(slow) as client:
        body = json.dumps(dict(prompt='def f(', max_tokens=120, stream=streams)).encode()
        host = ('127.0.0.1', client.base_url.port)
        for reads in (False, True)[:1 + streams]:
            with socket.create_connection(host) as s:
                s.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                          b'Content-Length: %d\r\n\r\n' % len(body) + body)
                assert until_true(lambda: client.worker.job)
                if reads: assert s.recv(10)
            began = time.monotonic()
            assert until_true(lambda: not client.worker.job) and time.monotonic() - began < 1.5
        figures = client.get('/metrics').text
        assert f'codegpt_ended_early_total{{why="gone"}} {1 + streams}.0' in figures
        assert complete(client, 'def f(', 4)['choices'][0]['text'] == function(slow, 'def f(', 4)


@needs_server
def test_a_later_request_of_a_session_takes_the_place_of_the_one_before(slow):
    with client_of(slow) as client, ThreadPoolExecutor(2) as pool:
        def ask(session, n): return client.post('/v1/completions', json=dict(prompt='def f(', max_tokens=n), headers={'x-session': session})
        first, waiting = pool.submit(ask, 'a', 120), None
        assert until_true(lambda: client.worker.job)
        waiting = pool.submit(ask, 'b', 3)
        assert until_true(lambda: len(client.worker.waiting) == 1)
        assert ask('a', 3).status_code == 200
        is_error(first.result(), 409, 'superseded')
        assert waiting.result().status_code == 200


@needs_server
def test_a_request_that_is_refused_ends_no_other(slow):
    with client_of(slow, bound=1) as client, ThreadPoolExecutor(3) as pool:
        def ask(session, n): return client.post('/v1/completions', json=dict(prompt='def f(', max_tokens=n), headers={'x-session': session})
        first = pool.submit(ask, 'a', 60)
        assert until_true(lambda: client.worker.job)
        waiting = pool.submit(ask, 'b', 3)
        assert until_true(lambda: len(client.worker.waiting) == 1)
        is_error(ask('a', 3), 429, 'queue_full')                # the one of its name that is being written goes on
        later = pool.submit(ask, 'b', 3)                        # and one that waits makes room
        assert [later.result().status_code, first.result().status_code] == [200, 200]
        is_error(waiting.result(), 409, 'superseded')


@needs_server
def test_a_text_that_ends_an_answer_is_said(raw):
    with client_of(raw) as client:
        def ask(**more): return client.post('/completion', json=dict(prompt='def f(', n_predict=6, **more)).json()
        free = ask()
        assert ask(stop=[free['content'][0]])['stop_type'] == 'word' and free['stop_type'] in ('eos', 'limit')


@needs_server
@pytest.mark.parametrize('body', [b'{"prompt": "\xff"}', b'['*20_000, b'{"prompt": ' + b'1'*5000 + b'}'], ids=['bytes', 'deep', 'number'])
def test_whatever_is_no_json_is_called_so(raw, body):
    with client_of(raw) as client:
        is_error(client.post('/v1/completions', content=body, headers={'content-type': 'application/json'}), 400, 'malformed_json')


@needs_server
def test_what_takes_too_long_ends(slow):
    with client_of(slow, timeout=.6) as client, ThreadPoolExecutor(2) as pool:
        two = [pool.submit(client.post, '/v1/completions', json=dict(prompt='def f(', max_tokens=120)) for _ in range(2)]
        for one in two: is_error(one.result(), 504, 'timeout')
        assert complete(client, 'def f(', 3)['choices'][0]['text'] == function(slow, 'def f(', 3)
        with socket.create_connection(('127.0.0.1', client.base_url.port)) as s:   # a body that does not come
            s.sendall(b'POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{')
            assert b' 408 ' in s.recv(100)


@needs_server
def test_an_answer_that_is_there_in_time_is_told_however_late_it_is_read():
    async def read():
        job = Job([], deadline=time.monotonic() - 1)
        job.tell('piece', 0, 'x')
        job.tell('end')
        await asyncio.sleep(.05)
        return [event async for event in _events(job)]
    assert asyncio.run(read()) == [('piece', 0, 'x')]


@needs_server
def test_a_session_whose_answer_is_never_begun_is_forgotten(raw):
    class Asking:   # a request of a client that goes away before its stream begins
        headers, scope = {'x-session': 'a'}, {'began': time.monotonic()}
    async def ask():
        server = Server(Worker(raw), Settings())
        job = server.job(Asking, [])
        assert dict(server.sessions) == {'a': job}
        server.worker.waiting.clear()   # as when it is done
        return server
    assert not asyncio.run(ask()).sessions


# The command

def command(*args, **how):
    code = 'from codegpt_nbc.runs.cli import main; main()'
    return subprocess.Popen([sys.executable, '-c', code, 'serve', *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


@needs_server
def test_the_command_serves_until_it_is_ended(folder):
    process = command(str(folder), '--port', '0')
    try:
        address = process.stdout.readline().split()[-1]
        with httpx.Client(base_url=address, timeout=30) as client: assert complete(client, 'SECRET(', 4)['model'] == folder.name
        port = address.rpartition(':')[2]
        other = command(str(folder), '--port', port)
        assert f'the server cannot have 127.0.0.1:{port}' in other.communicate()[1]
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert 'SECRET' not in out + err and 'Traceback' not in err


@needs_server
def test_other_machines_need_a_token(folder):
    process = command(str(folder), '--host', '0.0.0.0', '--port', '0')
    assert process.communicate()[1] == ('codegpt-nbc: others can reach 0.0.0.0: give --token TOKEN, which requests must then bear, '
                                        'or stay at 127.0.0.1.\n') and process.returncode == 1


def test_without_its_packages_the_command_names_them():
    code = "import sys; sys.modules['fastapi'] = None; sys.argv = ['codegpt-nbc', 'serve']; from codegpt_nbc.runs.cli import main; main()"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stderr == "codegpt-nbc: the server's packages are not installed: pip install 'codegpt_nbc[serve]'.\n"
