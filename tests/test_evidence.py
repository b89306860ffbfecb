"""Evidence that counts what it says: floors, energy, digests, validation text, p-values; and what an adopted model keeps."""
import io, json, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from scipy.stats import ttest_1samp
from tokenizers import Tokenizer, models, pre_tokenizers
from codegpt_nbc.core.paths import BASE_MODEL, digest, write_json
from codegpt_nbc.data.samples import _read_parquet, load_samples, load_texts
from codegpt_nbc.data.tokenizer import load_tokenizer, pack
from codegpt_nbc.evidence import measure, other_engines
from codegpt_nbc.evidence.editing import summarise_replay
from codegpt_nbc.evidence.energy import Meter, counters
from codegpt_nbc.evidence.evaluate import against
from codegpt_nbc.evidence.harness import TransformersEngine, register
from codegpt_nbc.evidence.metrics import paired, sign_flip_p
from codegpt_nbc.evidence.other_engines import PEERS, PeersConfig, cache_width, floor, source_of
from codegpt_nbc.methods.distill import DistillConfig
from codegpt_nbc.model import pretrain as pretraining
from codegpt_nbc.model.convert_format import save_adopted, with_words
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.folder import load_model, save_model, special_ids
from codegpt_nbc.model.layers import KVCache, Shape
from codegpt_nbc.model.pretrain import PretrainConfig, mean_loss, packed_corpus, pretrain_step
from codegpt_nbc.model.train import Windows

SHAPE = Shape(50, 16, 32, 8, (2, 1), (48, 20))


def cached_numbers(shape, positions):
    cache = KVCache(shape, 1, positions)
    return sum(t.numel() for t in (*cache.k, *cache.v))


def test_rounded_weights_have_the_smallest_cache_even_where_float32_is_the_fastest_float():
    rates = dict(fp32=4., bf16=1., int8=8., bandwidth=1.)
    for cached in (4, 2, 1):
        rows = floor(SHAPE, 8, 4, rates, cached)
        for row, weight in (('int8', 1), ('int4', .5), ('fp32', 4)):
            weights = weight*(other_engines.weights_of_blocks(SHAPE) + SHAPE.vocab*SHAPE.d_model)
            want = weights + cached_numbers(SHAPE, 8 + 4//2)*(4 if row == 'fp32' else cached)
            assert rows[row]['decode_ms_per_token']/1e3 == pytest.approx(want)
    assert min(map(cache_width, ('torch fp32', 'onnx fp32'))) == 4 and min(map(cache_width, ('torch fp32', 'onnx int8 blocks'))) == 2
    assert cache_width('OpenVINO int8') < cache_width('llama.cpp Q8_0') < cache_width('CTranslate2 int8')
    assert all(cache_width(name) in (1, 2, 4) for name in PEERS)


def test_random_weights_are_named_after_tokenizer_shape_and_code(tmp_path, monkeypatch):
    import codegpt_nbc.methods.vocabulary as vocabulary
    monkeypatch.setenv('CODEGPT_NBC_HOME', str(tmp_path))
    monkeypatch.setattr(vocabulary, 'CODEGPT', SHAPE)
    def source(): return source_of(PeersConfig(run_id='x', profile='try', geometry='codegpt', model=BASE_MODEL.name))
    first = source()
    assert source() == first and load_model(first).shape.vocab == SHAPE.vocab
    monkeypatch.setattr(vocabulary, 'CODEGPT', Shape(60, 16, 32, 8, (2,), (48,)))
    other = source()
    assert other.parent != first.parent and load_model(other).shape.vocab == 60
    monkeypatch.setattr(other_engines, 'code_of', lambda *places: 'changed')
    again = source()
    assert again != other and again.parent == other.parent and not other.exists()   # what older code made is gone


def test_texts_pass_over_the_samples_that_are_passed_over():
    seen = []
    worker = SimpleNamespace(ask=lambda what: seen.extend(what[0]) or {'lines': ['x']*len(what[0])})
    other_engines._texts({'a': worker}, PeersConfig(run_id='x', texts=2, skip=3))
    assert seen == load_samples('codexglue', 2, skip=3).input.tolist()


def test_no_project_is_trained_on_and_validated_on(monkeypatch):
    packed = []
    monkeypatch.setattr(pretraining, 'pack', lambda tok, texts: packed.append(texts) or pack(tok, texts[:1]))
    packed_corpus(PretrainConfig(run_id='x', stages=[]))
    shard, prompts = _read_parquet(pretraining.BASE_MODEL.parent/'corpus', 'train.parquet'), load_samples('codexglue', split='valid')
    trained, valid = packed
    assert trained == load_texts()[50:350] and len(valid) > 100
    assert not set(shard[shard.text.isin(trained)].project) & set(prompts[prompts.input.isin(valid)].project)


def test_a_digest_is_of_all_numbers_of_an_array():
    a = np.arange(10**5, dtype=np.uint16)
    b = np.where(np.arange(10**5) % 1000 == 500, 7, a).astype(np.uint16)
    assert str(a) == str(b) and digest(a) != digest(b) and digest(a) == digest(a.copy())
    assert len({digest(x) for x in (a, a.astype(np.int32), a.reshape(2, -1), torch.from_numpy(a.astype(np.int64)))}) == 4
    for table in (pd.DataFrame({'a': ['x']*1000}), pd.Series(['x'])):
        with pytest.raises(ValueError, match='that does not hold numbers alone has no digest'): digest(table)


def test_checkpoints_belong_to_tokens_and_code(tmp_path, monkeypatch):
    c = PretrainConfig(run_id='x', width=16, heads=2, context=8, stages=[dict(layers=1, length=8, batch=2, steps=1, warmup=0)])
    ids, places = np.arange(5000, dtype=np.uint16), []
    def stop(cfg, tokens, vocab, work): raise InterruptedError(places.append(work.name))
    monkeypatch.setattr(pretraining, 'pretrain', stop)
    def started(tokens):
        monkeypatch.setattr(pretraining, 'packed_corpus', lambda c: (BASE_MODEL, tokens, tokens, 'any'))
        with pytest.raises(InterruptedError): pretrain_step(c, tmp_path/'m')
        return places[-1]
    first = started(ids)
    assert started(ids.copy()) == first != started(np.where(ids == 2500, 0, ids).astype(np.uint16))
    monkeypatch.setattr(pretraining, 'code_of', lambda *wings: 'changed')
    assert started(ids) != first


@pytest.mark.parametrize('second, said', [
    (dict(layers=3), 'a model of 2 layers cannot grow to 3: give a multiple'),
    (dict(lenght=8), "unknown parameter 'lenght' of Stage: did you mean"),
    (dict(length=64), 'a stage has rows of 64 tokens, but the model 32 positions'),
    (dict(schedule='cosin'), "parameter 'schedule' of Stage is 'cosin'"),
    (dict(steps=0), "parameter 'steps' of Stage is 0")])
def test_a_later_stage_is_refused_before_the_first_is_trained(second, said):
    first = dict(layers=2, length=32, batch=2, steps=1)
    with pytest.raises(ValueError, match=f'^{said}') as e: PretrainConfig(run_id='x', context=32, stages=[first, first | second])
    assert '\n' not in str(e.value) and not str(e.value).endswith('..')


def test_no_stage_at_all_is_one_sentence():
    c = PretrainConfig(run_id='x', stages=[])
    with pytest.raises(ValueError, match='stages is empty: give one at least'): pretraining.pretrain(c, None, 9, 'w')


def test_parameters_that_contradict_each_other_are_one_sentence():
    with pytest.raises(ValueError, match="^layers are chosen for a student that is 'random' or 'reduced': [^.]*[.]$"):
        DistillConfig(run_id='x', student='model', layers=3)


def test_a_corpus_shorter_than_a_row_is_one_sentence(tmp_path, monkeypatch):
    ids, said = np.arange(SHAPE.context, dtype=np.uint16), 'the corpus has 16 tokens, but a row of length 16 takes 17'
    with pytest.raises(ValueError, match=said): Windows(ids, 2, SHAPE.context)
    with pytest.raises(ValueError, match=said): mean_loss(Decoder(SHAPE), ids)
    assert mean_loss(Decoder(SHAPE).init_weights(), np.arange(SHAPE.context + 1, dtype=np.uint16)) > 0
    monkeypatch.setattr(pretraining, 'packed_corpus', lambda c: (BASE_MODEL, np.zeros(99, np.uint16), ids, 'any'))
    monkeypatch.setattr(pretraining, 'pretrain', lambda *_: pytest.fail('it began to train'))
    with pytest.raises(ValueError, match=said): pretrain_step(PretrainConfig(run_id='x', context=16, stages=[]), tmp_path/'m')


def counter(folder: Path, zone: str, name: str, microjoules: int):
    (folder/zone).mkdir(exist_ok=True)
    for file, said in dict(name=name, energy_uj=microjoules, max_energy_range_uj=10**6).items(): (folder/zone/file).write_text(f'{said}\n')


def test_energy_of_memory_is_added_and_named(tmp_path):
    zones = {'intel-rapl:0': 'package-0', 'intel-rapl:0:0': 'core', 'intel-rapl:0:1': 'dram', 'intel-rapl:1': 'psys'}
    for zone, name in zones.items(): counter(tmp_path, zone, name, 100)
    assert set(counters(tmp_path)) == {'intel-rapl:0', 'intel-rapl:0:1'}
    with Meter(folder=tmp_path) as meter:
        for i, (zone, name) in enumerate(zones.items()): counter(tmp_path, zone, name, 100 + 10**(i + 1))
    assert (meter.joules, meter.source) == (pytest.approx((10 + 1000)/1e6), 'RAPL (package-0, dram)')


def test_a_replay_is_summarised_over_what_all_ways_answered():
    texts, seconds = {'a': ['x', 'x', 'x', None], 'b': [None, None, 'x', 'x']}, {'a': [1., 1., 3., 9.], 'b': [.001, .001, 6., 9.]}
    df = pd.DataFrame({f'{way}_{what}': values for way in 'ab'
                       for what, values in (('text', texts[way]), ('seconds', seconds[way]), ('cpu', seconds[way]))})
    table = summarise_replay(df, 'a')
    assert table.requests.tolist() == [1, 1] and table.refused.to_dict() == {'a': 1, 'b': 2}
    assert table.ratio['b'] == table.ratio_cpu['b'] == 2 and table.same_text['b'] == 1


def test_an_adopted_model_keeps_kind_of_float_settings_and_context(tmp_path):
    tok = load_tokenizer()
    parent = save_model(Decoder(Shape(tok.get_vocab_size(), 1024, 16, 4, (4,), (64,))).init_weights(), tmp_path/'p', dtype=torch.bfloat16)
    write_json(parent/'generation_config.json', {'eos_token_id': 77, 'temperature': .3})
    (parent/'chat_template.jinja').write_text('{{ messages }}', encoding='utf-8')
    about = json.loads((parent/'tokenizer_config.json').read_text(encoding='utf-8'))
    write_json(parent/'tokenizer_config.json', about | {'chat_template': 'older'})
    made = save_adopted(load_model(parent), tok, tmp_path/'a', {'method': 'adopt'}, parent)
    def read(name): return json.loads((made/name).read_text(encoding='utf-8'))
    assert read('config.json')['torch_dtype'] == 'bfloat16'
    assert read('generation_config.json') == {'eos_token_id': tok.token_to_id('</s>'), 'temperature': .3} | special_ids(made)
    assert (made/'chat_template.jinja').read_text(encoding='utf-8') == '{{ messages }}'
    assert (read('tokenizer_config.json')['chat_template'], read('tokenizer_config.json')['model_max_length']) == ('older', 1024)
    alone = save_adopted(load_model(parent), tok, tmp_path/'b', {'method': 'adopt'})
    assert json.loads((alone/'config.json').read_text(encoding='utf-8'))['torch_dtype'] == 'float32'


def test_a_word_that_no_token_spells_begins_as_the_mean_of_all():
    tok = Tokenizer(models.WordLevel({'a': 0, '0': 1, '[U]': 2}, unk_token='[U]'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()   # drops line breaks
    before = Decoder(Shape(3, 16, 8, 4, (2,), (16,))).init_weights()
    after, more = with_words(before, tok, ['<EOL>', '<NUM_LIT>'])
    rows, old = after.tokens.weight.detach(), before.tokens.weight.detach()
    torch.testing.assert_close(rows[more.token_to_id('<EOL>')], old.mean(0))
    torch.testing.assert_close(rows[more.token_to_id('<NUM_LIT>')], old[1])


def test_a_system_without_the_line_of_peak_memory(monkeypatch):
    monkeypatch.setattr(measure, 'open', lambda *_, **__: io.StringIO('Name: x\nVmRSS: 100 kB\n'), raising=False)
    assert measure.peak_memory() > 10**7
    monkeypatch.setattr(measure, 'open', lambda *_, **__: io.StringIO('Name: x\nVmHWM: 100 kB\n'), raising=False)
    assert measure.peak_memory() == 100*1024


class Elsewhere(torch.nn.Module):
    "A model on a device that has no numbers, which notes where what it is given lies."
    device = torch.device('meta')
    config = SimpleNamespace(to_dict=lambda: json.loads((BASE_MODEL/'config.json').read_text(encoding='utf-8')))
    def forward(self, ids, attention_mask, position_ids, **_):
        self.given = {t.device.type for t in (ids, attention_mask, position_ids)}
        cache = SimpleNamespace(reorder_cache=lambda rows: self.given.add(rows.device.type))
        return SimpleNamespace(logits=torch.zeros(len(ids), 1, 3), past_key_values=cache)


def test_the_harness_asks_a_model_where_it_is():
    model = Elsewhere()
    engine = TransformersEngine(model)
    engine.start(2, 8)
    assert engine.mask.device.type == 'meta'
    assert engine.prefill(np.ones((2, 3), np.int64), np.array([3, 2])).shape == (2, 3)
    engine.keep(np.array([0, 1]))
    engine.step(np.array([1, 2]))
    assert model.given == {'meta'}


@pytest.fixture
def harness_of(monkeypatch):
    "The harness's model, without the harness: what our loop is asked for, and a function that makes one."
    from codegpt_nbc.evidence import harness
    Theirs = type('HFLM', (), {'batch_size': property(lambda self: self.batch_size_per_gpu), 'model': None,
                               'generate_until': lambda self, requests, quiet=False: [f'theirs {r.args[0]}' for r in requests]})
    stubs = {'lm_eval.api.registry': {'register_model': lambda name: lambda kind: kind}, 'lm_eval.models.huggingface': {'HFLM': Theirs}}
    for name in ('lm_eval', 'lm_eval.api', 'lm_eval.models', *stubs):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**stubs.get(name, {})))
    asked = []
    def ours(engine, tok, texts, new, **how): asked.append((texts, new, how)); return [f'ours {t}' for t in texts]
    monkeypatch.setattr(harness, 'TransformersEngine', lambda model: model)
    monkeypatch.setattr(harness, 'complete_raw', ours)
    def made(size='auto', raw=True):
        lm = (kind := register()).__new__(kind)
        lm.reads_raw, lm.own_tokenizer, lm.batch_size_per_gpu = raw, None, size
        return lm
    return asked, made


def request(text, new=48, until='\n', **more):
    "As the harness asks. `new`: tokens at most; None: the task does not say."
    return SimpleNamespace(args=(text, {'until': [until]} | ({'max_gen_toks': new} if new else {}) | more))


def test_the_harness_may_choose_how_many(harness_of):
    asked, made = harness_of
    for size in ('auto', 4, '8'): made(size).generate_until([request('x')])
    assert asked == [(['x'], 48, {}), (['x'], 48, {'batch': 4}), (['x'], 48, {'batch': 8})]


def test_a_task_of_the_harness_is_answered_as_if_it_were_alone(harness_of):
    asked, made = harness_of
    both = [request('a'), request('b', until='\n\n'), request('c', 4), request('d'), request('e', None),
            request('f', None, max_new_tokens=5), request('g', do_sample=True), request('h', 256)]
    want = ['ours a', 'theirs b', 'ours c', 'ours d', 'theirs e', 'ours f', 'theirs g', 'theirs h']
    assert made().generate_until(both) == want == [made().generate_until([r])[0] for r in both]
    assert asked[:3] == [(['a', 'd'], 48, {}), (['c'], 4, {}), (['f'], 5, {})]
    assert made(raw=False).generate_until(both[:1]) == ['theirs a']


def test_p_does_not_hang_on_the_unit():
    d = np.random.default_rng(0).normal(.5, 3, 40)
    assert sign_flip_p(d/1e6) == pytest.approx(sign_flip_p(d), abs=1e-3) and .1 < sign_flip_p(d) < .9


def test_a_constant_difference_has_the_least_p_of_the_flips():
    for x in (np.ones(200), np.full(200, .1), np.linspace(60, 70, 200) + .1 - np.linspace(60, 70, 200)):
        assert sign_flip_p(x, flips=500) == 1/501
    d = np.random.default_rng(0).normal(1, 1, 200)
    assert sign_flip_p(d, flips=500) == pytest.approx(ttest_1samp(d, 0).pvalue, rel=1e-3)


def test_other_samples_are_not_compared():
    with pytest.raises(ValueError, match='3 scores are compared with 1: ask both models the same samples'): paired([1, 2, 3], [1])


def test_equal_answers_leave_no_nan_in_a_result():
    from codegpt_nbc.report.style import number
    same = SimpleNamespace(skip=0, n=3, es_each='1 2 3', em_each='010')
    for found in (*against(same, same).values(), paired([1.], [2.])):
        assert found['detectable'] is None and number(found['detectable'], 2) == '–'
        json.dumps(found, allow_nan=False)
