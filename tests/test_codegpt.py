"""Published models and data: a hub that answers on this machine, and what can be wrong with a download.

Each fault ends with one sentence and a non-zero exit.
"""
import hashlib, http.server, json, os, re, shutil, sys, threading
from pathlib import Path
from types import SimpleNamespace
import pytest
from huggingface_hub import constants
from codegpt_nbc.runs.cli import main
from codegpt_nbc.evidence.cost import stand_in
from codegpt_nbc.model.layers import gpt2_shape

COMMIT = '0123456789'*4


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A stand-in of the least size, its code, and variants of both that lack something."
    d = tmp_path_factory.mktemp('made')
    os.environ['CODEGPT_NBC_HOME'] = str(d)
    try: stand_in(d/'codegpt', gpt2_shape(1000, 256, 32, 2, 2), texts=60)
    finally: del os.environ['CODEGPT_NBC_HOME']
    return d


class Hub(http.server.BaseHTTPRequestHandler):
    "As much of the hub's protocol as a download needs."
    protocol_version = 'HTTP/1.1'
    root, short = None, False           # where repositories lie; send half of each large file
    asked = []                          # paths

    def log_message(self, *args): pass

    def answer(self, body=b'', status=200, **headers):
        self.send_response(status)
        cut = body[:len(body)//2] if self.short and len(body) > 20_000 else body
        for k, v in {'Content-Length': len(body), **headers}.items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command == 'GET': self.wfile.write(cut)
        if cut is not body: self.close_connection = True

    def do_GET(self):
        path = self.path.split('?')[0].strip('/')
        self.asked.append(path)
        if m := re.fullmatch(r'api/(?:models|datasets)/[^/]+/[^/]+/(refs|commits/(.+))', path):
            pull = {'name': '1', 'ref': 'refs/pr/1', 'targetCommit': COMMIT}
            main = {'name': 'main', 'ref': 'refs/heads/main', 'targetCommit': 'f'*40}
            refs = dict(branches=[main], converts=[], tags=[], pullRequests=[pull])
            commit = dict(id='f'*40 if m[2] == 'main' else COMMIT, authors=[], date='2023-01-01T00:00:00.000Z', title='', message='')
            return self.answer(json.dumps(refs if m[1] == 'refs' else [commit]).encode(), Content_Type='application/json')
        if m := re.fullmatch(r'api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)', path):
            kind, repo, what, revision = m.groups()
            if repo == 'gated/model': return self.answer(b'', 403, X_Error_Code='GatedRepo', X_Error_Message='gated')
            if not (self.root/repo.split('/')[1]).is_dir(): return self.answer(b'', 404, X_Error_Code='RepoNotFound', X_Error_Message='no')
            if revision not in (COMMIT, 'main'): return self.answer(b'', 404, X_Error_Code='RevisionNotFound', X_Error_Message='no')
            folder = self.root/repo.split('/')[1]
            files = [p for p in sorted(folder.rglob('*')) if p.is_file()]
            tree = [{'type': 'file', 'path': p.relative_to(folder).as_posix(), 'size': p.stat().st_size,
                     'oid': hashlib.sha1(p.read_bytes()).hexdigest()} for p in files]
            siblings = [{'rfilename': t['path']} for t in tree]
            body = tree if what == 'tree' else {'id': repo, 'sha': COMMIT, 'siblings': siblings}
            return self.answer(json.dumps(body).encode(), Content_Type='application/json')
        if m := re.fullmatch(r'(?:datasets/)?[^/]+/([^/]+)/resolve/[^/]+/(.+)', path):
            data = (self.root/m[1]/m[2]).read_bytes()
            return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)
        self.answer(b'', 404)

    do_HEAD = do_GET


@pytest.fixture
def hub(made):
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('H', (Hub,), {'root': made})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    "`codegpt-nbc evaluate` in this process, without this machine's own hub cache: exit status, output and errors."
    def call(model, *args, endpoint='http://127.0.0.1:9', offline=False, n=4):
        variables = dict(CODEGPT_NBC_HOME=tmp_path, HF_HUB_OFFLINE=int(offline), NO_PROXY='127.0.0.1')
        for k, v in variables.items(): monkeypatch.setenv(k, str(v))
        monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda s: None)      # it would wait between its attempts
        url = endpoint + '/{repo_id}/resolve/{revision}/{filename}'
        settings = dict(ENDPOINT=endpoint, HUGGINGFACE_CO_URL_TEMPLATE=url, HF_HUB_CACHE=str(tmp_path/'hf'),
                        HF_HUB_OFFLINE=offline, HF_HUB_DISABLE_XET=True)
        for k, v in settings.items(): monkeypatch.setattr(constants, k, v)
        monkeypatch.setattr(sys, 'argv', ['codegpt-nbc', 'evaluate', str(model), '--n', str(n), *map(str, args)])
        try: main(); status = 0
        except SystemExit as e: status = e.code or 0
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())
    return call


def sentence(p):
    lines = p.err.strip().splitlines()
    assert p.status == 1 and lines[-1].startswith('codegpt-nbc: '), p.err[-2000:]
    return lines[-1]


def test_a_model_and_its_code_come_from_the_hub_once(made, hub, tmp_path, evaluate):
    url, model, data = f'http://127.0.0.1:{hub.server_port}', f'some/codegpt@{COMMIT}', f'some/codegpt-data@{COMMIT}'
    first = evaluate(model, '--data', data, endpoint=url)
    assert first.status == 0 and 'n 4' in first.out, first.err[-2000:]
    again = evaluate(model, '--data', data, offline=True)             # from the cache
    scores = lambda p: p.out.rsplit('  ', 1)[0]                                   # without the seconds
    assert again.status == 0 and scores(again) == scores(first), again.err[-2000:]
    local = evaluate(made/'codegpt', '--data', made/'codegpt-data')
    assert scores(local) == scores(first), local.err[-2000:]


def test_a_short_commit_is_found_in_a_pull_request_and_then_in_the_cache(made, hub, evaluate):
    url = f'http://127.0.0.1:{hub.server_port}'
    assert evaluate(f'some/codegpt@{COMMIT[:7]}', endpoint=url).status == 0
    assert evaluate(f'some/codegpt@{COMMIT[:9]}', offline=True).status == 0
    assert "has no revision 'abcdef0'" in sentence(evaluate('some/codegpt@abcdef0', endpoint=url))


def test_pickled_weights_are_fetched_only_where_there_are_no_others(made, hub, evaluate):
    from safetensors.torch import load_file
    import torch
    url, old = f'http://127.0.0.1:{hub.server_port}', made/'pickled'
    shutil.copytree(made/'codegpt', old, dirs_exist_ok=True)
    torch.save(load_file(old/'model.safetensors'), old/'pytorch_model.bin')
    hub.RequestHandlerClass.asked.clear()
    assert evaluate(f'some/pickled@{COMMIT}', endpoint=url).status == 0
    assert not any(path.endswith('.bin') for path in hub.RequestHandlerClass.asked)
    (old/'model.safetensors').rename(made/'aside.safetensors')
    shutil.copytree(old, made/'older', dirs_exist_ok=True)
    (made/'aside.safetensors').rename(old/'model.safetensors')
    done = evaluate(f'some/older@{COMMIT}', endpoint=url)
    assert done.status == 0 and any(path.endswith('pytorch_model.bin') for path in hub.RequestHandlerClass.asked), done.err[-2000:]


def test_weights_and_tokenizer_of_two_places(made, hub, tmp_path, evaluate):
    bare, words = made/'bare', made/'words'
    for folder, names in ((bare, ('config.json', 'model.safetensors')), (words, ('tokenizer.json', 'tokenizer_config.json'))):
        folder.mkdir(exist_ok=True)
        for n in names: (folder/n).write_bytes((made/'codegpt'/n).read_bytes())
    assert 'holds no tokenizer' in sentence(evaluate(bare))
    both = evaluate(f'{bare} + some/words@{COMMIT}', endpoint=f'http://127.0.0.1:{hub.server_port}')
    assert both.status == 0, both.err[-2000:]


@pytest.mark.parametrize('model, said', [
    ('gated/model@main', 'the model gated/model on the hub is gated: ask for access'),
    (f'no/body@{COMMIT}', 'the model no/body on the hub does not exist or is private'),
    ('some/codegpt@v9', "the model some/codegpt on the hub has no revision 'v9'"),
    ('some/codegpt', 'lacks a revision: write some/codegpt@COMMIT'),
])
def test_what_the_hub_refuses(made, hub, tmp_path, model, said, evaluate):
    assert said in sentence(evaluate(model, endpoint=f'http://127.0.0.1:{hub.server_port}'))


def test_without_the_hub(tmp_path, evaluate):
    offline = sentence(evaluate(f'some/codegpt@{COMMIT}', offline=True))
    assert 'HF_HUB_OFFLINE is set: fetch it once with HF_HUB_OFFLINE=0, or give a folder' in offline
    assert 'the hub cannot be reached: connect, or give a folder' in sentence(evaluate(f'some/codegpt@{COMMIT}'))
    assert "there is no model 'nobody'" in sentence(evaluate('nobody'))
    assert "there is no code 'nothing'" in sentence(evaluate('codegpt-nano', '--data', 'nothing'))


def test_a_download_that_breaks_off(made, hub, tmp_path, evaluate):
    hub.RequestHandlerClass.short = True
    url = f'http://127.0.0.1:{hub.server_port}'
    assert 'did not arrive whole' in sentence(evaluate(f'some/codegpt@{COMMIT}', endpoint=url))
    hub.RequestHandlerClass.short = False
    assert evaluate(f'some/codegpt@{COMMIT}', endpoint=url).status == 0, 'the next call fetches the rest'


def variant(made, tmp_path, name='codegpt'):
    return Path(shutil.copytree(made/name, tmp_path/name))


def test_a_folder_that_is_not_whole(made, tmp_path, evaluate):
    m = variant(made, tmp_path)
    whole = (m/'model.safetensors').read_bytes()
    (m/'model.safetensors').write_bytes(whole[:len(whole)//2])
    assert 'truncated or corrupt' in sentence(evaluate(m))
    (m/'model.safetensors').unlink()
    (m/'pytorch_model.bin').write_bytes(b'pickle')
    assert 'holds more than weights (UnpicklingError): give the model as safetensors' in sentence(evaluate(m))


def test_a_tokenizer_without_end_of_line(made, tmp_path, evaluate):
    m = variant(made, tmp_path)
    t = (m/'tokenizer.json').read_text(encoding='utf-8')
    (m/'tokenizer.json').write_text(t.replace('"<EOL>"', '"<LINE>"'), encoding='utf-8')
    assert 'reads raw source: choose line or infill' in sentence(evaluate(m, '--protocol', 'codexglue'))


def test_code_without_its_fields(made, tmp_path, evaluate):
    data = variant(made, tmp_path, 'codegpt-data')
    test = data/'line_completion'/'test.json'
    lines = test.read_text(encoding='utf-8').splitlines()
    test.write_text('\n'.join([lines[0], '{"input": "<s> a"}']), encoding='utf-8')
    assert "test.json, line 2, lacks the field 'gt'" in sentence(evaluate(made/'codegpt', '--data', data))
    test.write_text('\n'.join(lines[:3]), encoding='utf-8')
    assert '4 samples asked, but codexglue has 3' in sentence(evaluate(made/'codegpt', '--data', data))
    (data/'token_completion'/'test.txt').unlink()
    assert 'has no sample with an answer' in sentence(evaluate(made/'codegpt', '--data', data))
    (data/'token_completion'/'train.txt').write_text('import os\n', encoding='utf-8')
    assert 'has no <EOL> in it' in sentence(evaluate(made/'codegpt', '--data', data))
