"""The editor's server, as a process of its own, under many clients: every answer is the function's, and its memory stays as it is.

CODEGPT_NBC_LOAD is the number of seconds that 32 clients ask, 5 without it, and CODEGPT_NBC_LOAD_MODEL the model, a small random one
without it. `pytest -s` prints the counts."""
import json, os, random, re, signal, socket, subprocess, sys, threading, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
import psutil, pytest
sys.path.insert(0, str(Path(__file__).parent))
from test_raw import TEXT, folder_that_fills_in
from test_serve import MISSING, function
from codegpt_nbc import load

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install '.[serve]' httpx")
SECONDS, CLIENTS, MOST = float(os.environ.get('CODEGPT_NBC_LOAD', 5)), 32, 8
LINES = [m.end() for m in re.finditer(r'\n    +(?=\w)', TEXT)]


@pytest.fixture(scope='module')
def model(tmp_path_factory): return load(os.environ.get('CODEGPT_NBC_LOAD_MODEL') or folder_that_fills_in(tmp_path_factory))


@pytest.fixture(scope='module')
def answers(model):
    "(prompt, suffix) → what the function writes, for prompts of several lengths."
    found = {}
    for i, at in enumerate(LINES[3::len(LINES)//14]):
        prompt = TEXT[max(0, at - 200*(1 + i % 5)):at + i % 4]
        prompt = prompt[prompt.find('\n') + 1:]
        try: found |= {(prompt, suffix): function(model, prompt, MOST, suffix) for suffix in (None, '')}
        except ValueError: pass   # cut within a string of several lines, it is no Python
    assert len(found) >= 12
    return found


class Process:
    "The command `codegpt-nbc serve`, which can be killed and started again at the same port."
    def __init__(self, model, **options):
        self.folder = str(model.folder)
        self.options = [f'--{name.replace("_", "-")}={value}' for name, value in options.items()]
        with socket.create_server(('127.0.0.1', 0)) as s: self.port = s.getsockname()[1]
        self.address = f'http://127.0.0.1:{self.port}'

    def start(self):
        command = [sys.executable, '-c', 'from codegpt_nbc.runs.cli import main; main()', 'serve', self.folder, f'--port={self.port}']
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = self.process.stdout.readline()
        assert said.rstrip().endswith(self.address), said + self.process.communicate()[1]

    def end(self, how=signal.SIGTERM) -> str: # what it said
        self.process.send_signal(how)
        return ''.join(self.process.communicate(timeout=30))

    @property
    def memory(self) -> int: return psutil.Process(self.process.pid).memory_info().rss


@contextmanager
def process_of(model, **options):
    server = Process(model, **options)
    server.start()
    try: yield server
    finally: said = server.end()
    assert 'Traceback' not in said and 'codegpt-nbc: ' not in said, said


def ask(client, prompt: str, suffix: str | None, stream: bool):
    "(status, text, seconds to wait) by one of the interfaces."
    if suffix is not None: path, body = '/infill', dict(input_prefix=prompt[:-4], prompt=prompt[-4:], input_suffix=suffix, n_predict=MOST)
    else: path, body = '/v1/completions', dict(prompt=prompt, max_tokens=MOST, stream=stream)
    answer = client.post(path, json=body)
    if answer.status_code != 200:
        assert answer.json()['error']['code'] == 'queue_full', answer.text
        return answer.status_code, None, int(answer.headers['retry-after'])
    if suffix is not None: return 200, answer.json()['content'], 0
    if not stream: return 200, answer.json()['choices'][0]['text'], 0
    events = [json.loads(line[6:]) for line in answer.text.split('\n\n') if line.startswith('data: {')]
    return 200, ''.join(e['choices'][0]['text'] for e in events), 0


class Crowd:
    "Clients that ask at once until they are told to stop. What is not the function's answer, nor stated, ends the test."
    def __init__(self, address: str, answers: dict, clients: int = CLIENTS, lost=()): # `lost`: exceptions of connections that may be cut
        self.address, self.answers, self.lost, self.counts = address, answers, lost, Counter()
        self.stop, self.pool = threading.Event(), ThreadPoolExecutor(clients)
        self.work = [self.pool.submit(self.one, k) for k in range(clients)]

    def one(self, k: int):
        import httpx
        rng, asked = random.Random(k), [*self.answers]
        with httpx.Client(base_url=self.address, timeout=600) as client:
            while not self.stop.is_set():
                one = rng.choice(asked)
                try: status, text, wait = ask(client, *one, stream=rng.random() < .5)
                except self.lost: status, wait = 'lost', .1
                self.counts[status] += 1
                if status == 200: assert text == self.answers[one], one
                else: self.stop.wait(min(wait, .5)*rng.random())

    def __enter__(self): return self
    def __exit__(self, *failed):
        self.stop.set()
        for work in self.work: work.result()
        self.pool.shutdown()


def median(values: list): return sorted(values)[len(values)//2]


def test_clients_at_once_and_memory_stays(model, answers):
    seen = []
    with process_of(model, memory=8, queue=12, timeout=600) as server:
        with Crowd(server.address, answers) as crowd:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                time.sleep(SECONDS/60)
                seen.append(server.memory/2**20)
        figures = figures_of(server)
    counts = crowd.counts
    third = len(seen)//3
    print(f'{SECONDS:g} s: {dict(counts)}, MB at a third {median(seen[third:][:5]):.0f}, at the end {median(seen[-5:]):.0f}')
    assert set(counts) <= {200, 429} and counts[200] >= SECONDS/2 and counts[429]
    assert median(seen[-5:]) < 1.05*median(seen[third:][:5]) + 16
    answered = sum(n for name, n in figures.items() if name.startswith('codegpt_requests_total') and 'status="200"' in name)
    assert answered == counts[200] and figures['codegpt_waiting'] == 0 and figures['codegpt_cache_bytes'] <= 2**23 + 2**22


def figures_of(server: Process) -> dict:
    import httpx
    text = httpx.get(f'{server.address}/metrics').text
    return {name: float(value) for name, value in (line.rsplit(' ', 1) for line in text.splitlines() if line[0] != '#')}


def test_clients_recover_when_the_server_is_killed(model, answers):
    import httpx
    with process_of(model, queue=12) as server, Crowd(server.address, answers, 8, lost=(httpx.TransportError,)) as crowd:
        def wait(more):
            "Until so many further answers came."
            end, before = time.monotonic() + 120, crowd.counts[200]
            while crowd.counts[200] < before + more:
                assert time.monotonic() < end and not any(work.done() for work in crowd.work), crowd.counts
                time.sleep(.05)
        for _ in range(2):
            wait(8)
            server.end(signal.SIGKILL)
            before = crowd.counts['lost']
            while crowd.counts['lost'] < before + 8: time.sleep(.05)
            server.start()
        wait(8)
        lost = crowd.counts['lost']
        wait(8)
        assert crowd.counts['lost'] == lost and set(crowd.counts) <= {200, 429, 'lost'}


def streaming(server: Process, prompts: list) -> socket.socket:
    "A client that asks for a stream and does not read it."
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    s.connect(('127.0.0.1', server.port))
    body = json.dumps(dict(prompt=prompts, max_tokens=MOST, stream=True)).encode()
    head = b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n'
    s.sendall(head % len(body) + body)
    return s


def test_rude_clients_disturb_nobody(model, answers):
    "Slow readers, a thousand open connections, prompts of ten megabytes and half requests, while others work."
    import httpx, resource
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2600: pytest.skip('fewer than 2,600 files may be open here: ulimit -n')
    with process_of(model, queue=12) as server, Crowd(server.address, answers, 4) as crowd:
        slow = [streaming(server, [prompt for prompt, _ in answers][:8]) for _ in range(3)]
        idle = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(1000)]
        for s in idle[:100]: s.sendall(b'POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"pro')
        memory = server.memory
        for _ in range(6):
            large = httpx.post(f'{server.address}/v1/completions', json=dict(prompt='x'*10*2**20), timeout=60)
            assert large.status_code == 413 and large.json()['error']['code'] == 'too_large'
        before, end = crowd.counts[200], time.monotonic() + 60
        while crowd.counts[200] < before + 12: assert time.monotonic() < end and not any(work.done() for work in crowd.work)
        assert server.memory < memory + 100*2**20
        for s in (*slow, *idle): s.close()
    assert set(crowd.counts) <= {200, 429}
