"""Clients that were not written here ask the editor's server: the package openai, llama.vim in Vim, and the requests of further plug-ins.

CODEGPT_NBC_LLAMA_VIM names a folder with llama.vim, https://github.com/ggml-org/llama.vim, for the test that runs it."""
import asyncio, os, shutil, sys, threading, time
from importlib.util import find_spec
from pathlib import Path
import pytest
sys.path.insert(0, str(Path(__file__).parent))
from test_serve import MISSING, client_of, function, stream, until_true
from test_serve import client, folder, raw, slow, words, words_client  # noqa: F401   fixtures
from codegpt_nbc.data.raw_text import INFILLS

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install '.[serve]' httpx")
needs_openai = pytest.mark.skipif(not find_spec('openai'), reason='no package openai: pip install openai')


# The package openai

@pytest.fixture
def theirs(client):  # noqa: F811
    import openai
    with openai.OpenAI(base_url=f'{client.base_url}/v1', api_key='none', max_retries=0) as theirs: yield theirs


@needs_openai
def test_openai_completes(theirs, raw):  # noqa: F811
    name = theirs.models.list().data[0].id
    assert theirs.models.retrieve(name).id == name
    answer = theirs.completions.create(model=name, prompt='def f(', max_tokens=6, suffix=')')
    assert answer.choices[0].text == function(raw, 'def f(', 6, ')') and answer.choices[0].finish_reason in ('stop', 'length')
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens <= answer.usage.prompt_tokens + 6
    again = theirs.completions.create(model=name, prompt='def f(', max_tokens=6, suffix=')')
    assert again.choices[0].text == answer.choices[0].text
    assert again.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens
    many = theirs.completions.create(model=name, prompt=['x = ', 'def '], max_tokens=4)
    assert [c.text for c in many.choices] == [function(raw, p, 4) for p in ('x = ', 'def ')]
    whole = function(raw, 'def f(', 24)
    cut = theirs.completions.create(model=name, prompt='def f(', max_tokens=24, stop=[whole[5:8]])
    assert cut.choices[0].text == function(raw, 'def f(', 24, stops=[whole[5:8]]) and cut.choices[0].finish_reason == 'stop'
    drawn = [theirs.completions.create(model=name, prompt='x', max_tokens=9, temperature=4., seed=5).choices[0].text for _ in range(2)]
    assert drawn[0] == drawn[1]


@needs_openai
def test_openai_streams(theirs, raw):  # noqa: F811
    asked = dict(model=raw.folder.name, prompt='def f(', max_tokens=6, stream=True, stream_options={'include_usage': True})
    *parts, last = theirs.completions.create(**asked)
    assert ''.join(part.choices[0].text for part in parts) == function(raw, 'def f(', 6)
    assert parts[-1].choices[0].finish_reason and last.choices == [] and last.usage.completion_tokens > 0


@needs_openai
def test_openai_knows_the_errors(theirs, slow):  # noqa: F811
    import openai
    with pytest.raises(openai.NotFoundError, match='name it') as e: theirs.completions.create(model='other', prompt='x')
    assert e.value.code == 'model_not_found' and e.value.type == 'not_found_error'
    name = theirs.models.list().data[0].id
    with pytest.raises(openai.BadRequestError, match='max_tokens'): theirs.completions.create(model=name, prompt='x', max_tokens=0)
    with client_of(slow, bound=1, token='geheim') as other:
        def theirs_of(key, retries=0): return openai.OpenAI(base_url=f'{other.base_url}/v1', api_key=key, max_retries=retries)
        with pytest.raises(openai.AuthenticationError, match='Bearer'): theirs_of('wrong').models.list()
        busy = [threading.Thread(target=ask_quietly, args=(theirs_of('geheim'), slow.folder.name, 20)) for _ in range(2)]
        for i, thread in enumerate(busy):
            thread.start()
            assert until_true(lambda: other.worker.job and len(other.worker.waiting) == i)
        with pytest.raises(openai.RateLimitError) as e: theirs_of('geheim').completions.create(model=slow.folder.name, prompt='x')
        assert e.value.code == 'queue_full' and int(e.value.response.headers['retry-after']) >= 1
        later = theirs_of('geheim', retries=8).completions.create(model=slow.folder.name, prompt='x', max_tokens=2)   # waits as it is told
        assert later.choices[0].text == function(slow, 'x', 2)
        for thread in busy: thread.join()


def ask_quietly(theirs, name: str, max_tokens: int): theirs.completions.create(model=name, prompt='def f(', max_tokens=max_tokens)


@needs_openai
def test_openai_cancels(slow):  # noqa: F811
    import openai
    with client_of(slow) as client:  # noqa: F811
        async def cancelled():
            async with openai.AsyncOpenAI(base_url=f'{client.base_url}/v1', api_key='none', max_retries=0) as theirs:
                asked = asyncio.create_task(theirs.completions.create(model=slow.folder.name, prompt='def f(', max_tokens=120))
                while not client.worker.job: await asyncio.sleep(.02)
                asked.cancel()
                with pytest.raises(asyncio.CancelledError): await asked
        asyncio.run(cancelled())
        began = time.monotonic()
        assert until_true(lambda: not client.worker.job) and time.monotonic() - began < 1.5


# What plug-ins for llama.cpp send, as their sources say it

OF_VIM = dict(id_slot=0, input_extra=[dict(text='x = 1\n', time=[1, 2], filename='other.py')], n_predict=128, stop=[], n_indent=4, top_k=40,
              top_p=.9, samplers=['top_k', 'top_p', 'infill'], stream=False, cache_prompt=True, t_max_prompt_ms=500, t_max_predict_ms=1000,
              response_fields=['content', 'timings/prompt_n', 'timings/prompt_ms', 'timings/prompt_per_token_ms', 'truncated',
                               'timings/prompt_per_second', 'timings/predicted_n', 'timings/predicted_ms', 'tokens_cached',
                               'timings/predicted_per_token_ms', 'timings/predicted_per_second'])
OF_VSCODE = dict(id_slot=0, input_extra=[dict(text='x = 1\n', filename='other.py')], n_predict=128, n_cmpl=1, top_k=40, top_p=.99,
                 stream=False, samplers=['top_k', 'top_p', 'infill'], cache_prompt=True, n_indent=4, t_max_prompt_ms=500,
                 t_max_predict_ms=2500)
AT_CURSOR = dict(input_prefix='import os\n\n\ndef f(x):\n', prompt='    retu', input_suffix='\n\nf(1)\n')


def test_what_llama_vim_sends(client, raw):  # noqa: F811
    want = function(raw, AT_CURSOR['input_prefix'] + AT_CURSOR['prompt'], 128, AT_CURSOR['input_suffix'])
    answer = client.post('/infill', json=OF_VIM | AT_CURSOR)
    assert '"content":"' in answer.text   # it looks for this before it reads JSON
    said = answer.json()
    assert said['content'] == want and set(said) == set(OF_VIM['response_fields']) - {'truncated'}
    assert said['timings/predicted_n'] > 0 and said['timings/prompt_ms'] > 0
    ahead = dict(id_slot=0, input_prefix='', input_suffix='', input_extra=OF_VIM['input_extra'], prompt='', n_predict=0, temperature=0.,
                 samplers=[], stream=False, cache_prompt=True, t_max_prompt_ms=1, t_max_predict_ms=1, response_fields=[''])
    assert client.post('/infill', json=ahead).json() == {}


def test_what_llama_vscode_sends(client, raw):  # noqa: F811
    answer = client.post('/infill', json=OF_VSCODE | AT_CURSOR).json()
    assert answer['content'] == function(raw, AT_CURSOR['input_prefix'] + AT_CURSOR['prompt'], 128, AT_CURSOR['input_suffix'])
    assert answer['generation_settings']['n_ctx'] == raw.engine.context   # its status line shows these
    timings = answer['timings']
    assert timings['prompt_n'] + answer['tokens_cached'] == answer['tokens_evaluated']
    assert timings['predicted_n'] == answer['tokens_predicted'] and timings['predicted_ms'] > 0 and timings['prompt_per_second'] >= 0
    ahead = {name: OF_VSCODE[name] for name in ('id_slot', 'input_extra', 'cache_prompt', 't_max_prompt_ms')}
    assert client.post('/infill', json=ahead | AT_CURSOR | dict(n_predict=0, samplers=[], t_max_predict_ms=1)).json()['content'] == ''


@pytest.mark.parametrize('spelled', INFILLS)
def test_a_gap_in_the_tokens_of_any_model(client, raw, words, words_client, spelled):  # noqa: F811
    infill = INFILLS[spelled]
    def marked(before, after): return f'{infill.before_prefix}{before}{infill.before_suffix}{after}{infill.before_answer}'
    before, after = AT_CURSOR['input_prefix'] + AT_CURSOR['prompt'], AT_CURSOR['input_suffix']
    asked = dict(prompt=marked(before, after), max_tokens=8)
    one = client.post('/v1/completions', json=asked).json()['choices'][0]['text']
    assert one == function(raw, before, 8, after) == client.post('/completion', json=asked | {'n_predict': 8}).json()['content']
    assert words_client.post('/v1/completions', json=asked).json()['error']['code'] == 'suffix_unsupported'
    theirs = '            # File: a.ipynb\n                ' + marked(before, '')   # as CellSense begins it
    for_words = words_client.post('/v1/completions', json=dict(prompt=theirs, max_tokens=8)).json()
    assert for_words['choices'][0]['text'] == function(words, before, 8)


def test_what_cellsense_sends(words):  # noqa: F811
    stops = ['<file_sep>', '<|endoftext|>', '<fim_prefix>', '<fim_suffix>', '<fim_middle>', '<fim_pad>', '<file_sep>', '<repo_name>',
             '<jupyter_start>', '<jupyter_text>', '<jupyter_code>', '<jupyter_output>', '<jupyter_script>', '<empty_output>']
    prompt = '<file_sep>b.py\ny = 2\n\n            <file_sep>Current File\n                <fim_prefix>x = [<fim_suffix>]\n<fim_middle>'
    with client_of(words, ignore_suffix=True, alias='starcoder') as other:
        asked = dict(model='starcoder', prompt=prompt, stop=stops, max_tokens=256, temperature=0)
        events, last = stream(other, '/v1/completions', **asked)
        assert ''.join(e['choices'][0]['text'] for e in events) == function(words, 'x = [', 256) and last == '[DONE]'
        assert [m['id'] for m in other.get('/v1/models').json()['data']] == ['starcoder'] == [events[0]['model']]
        assert other.post('/v1/completions', json=asked | {'model': words.folder.name}).json()['error']['code'] == 'model_not_found'


# llama.vim

LLAMA_VIM = os.environ.get('CODEGPT_NBC_LLAMA_VIM')
NO_VIM = next((f'there is no {tool}: apt-get install {tool}' for tool in ('vim', 'curl') if not shutil.which(tool)), None) or \
         (None if find_spec('pexpect') else 'no package pexpect: pip install pexpect')


@pytest.mark.skipif(not LLAMA_VIM, reason='CODEGPT_NBC_LLAMA_VIM does not name a folder with llama.vim')
@pytest.mark.skipif(bool(NO_VIM), reason=str(NO_VIM))
def test_tab_takes_the_completion_in_vim(words, tmp_path):  # noqa: F811
    import pexpect
    file, before, typed = tmp_path/'t.py', 'import json\n\n\ndef read(x):\n    return json.load(x)\n\n\n', 'def save(path):\n    with open('
    file.write_text(before)
    with client_of(words, ignore_suffix=True) as other:
        config = f"{{'endpoint_fim': '{other.base_url}/infill', 'show_info': 0}}"
        (tmp_path/'rc').write_text(f'set nocompatible\nlet g:llama_config = {config}\nset rtp+={Path(LLAMA_VIM).resolve()}\n')
        env = {'TERM': 'xterm', 'HOME': str(tmp_path), 'PATH': os.environ['PATH']}
        vim = pexpect.spawn('vim', ['-Nu', str(tmp_path/'rc'), '-i', 'NONE', '-n', str(file)], env=env, cwd=str(tmp_path))
        def served(): return sum(s.value for m in other.worker.figures.requests.collect() for s in m.samples if s.name.endswith('_total'))
        try:
            time.sleep(2)
            vim.send('Go' + typed.replace('\n', '\r'))
            seen = served()
            assert until_true(lambda: served() > seen and not other.worker.job, 20)
            time.sleep(1)
            vim.send('\t')
            time.sleep(.5)
            vim.send('\x1b:wq\r')
            vim.expect(pexpect.EOF, timeout=10)
        finally: vim.close(force=True)
    assert file.read_text() == f'{before}{typed}' + function(words, before + typed, 128) + '\n'
