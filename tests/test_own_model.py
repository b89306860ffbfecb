"""A model of one's own: what cannot be used is said before the work, and what a call says it does it does."""
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from codegpt_nbc import compress
from codegpt_nbc.core.paths import BASE_MODEL, write_json
from codegpt_nbc.data.codexglue import code_lines
from codegpt_nbc.data.inputs import RunConfig
from codegpt_nbc.engines.gguf_export import export_gguf
from codegpt_nbc.evidence.harness import write_task
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.folder import load_model, save_model
from codegpt_nbc.model.gguf_import import read_gguf
from codegpt_nbc.model.layers import Shape
from test_rare import tiny


def of_whole_words(folder):
    "A tokenizer that is neither byte-level nor SentencePiece's, and a model for it."
    tok = Tokenizer(models.WordLevel({word: i for i, word in enumerate(['<unk>', 'def', 'return', 'x'])}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    tok.save(str(folder/'tokenizer.json'))
    write_json(folder/'config.json', {'codegpt_nbc': {'text': 'raw'}})
    return save_model(Decoder(Shape(4, 96, 32, 16, (2,), (64,))).init_weights(), folder.with_name('words'), parent=folder)


def with_tokens_more(folder):
    "A tokenizer that was given two tokens, and a model whose embedding was not."
    path = tiny(folder)/'tokenizer.json'
    tok = Tokenizer.from_file(str(path))
    tok.add_special_tokens(['<|one|>', '<|two|>'])
    tok.save(str(path))
    return folder


@pytest.mark.parametrize('make, said', [(of_whole_words, 'neither byte-level nor'), (with_tokens_more, 'tokens but the model only')])
def test_a_tokenizer_that_cannot_be_used_is_refused_before_the_work(make, said, home, tmp_path, monkeypatch):
    monkeypatch.setattr('codegpt_nbc.runs.steps.make_recipe', lambda *_, **__: pytest.fail('it worked'))
    folder = make(tmp_path/'model')
    with pytest.raises(ValueError, match=said): compress(folder, out=tmp_path/'small', recipe='int8', progress=False)
    with pytest.raises(ValueError, match=said):
        RunConfig(run_id='x', model=str(folder), codexglue=0, thesis=0).with_samples(4).check()
    assert not (tmp_path/'small').exists()


def test_a_protocol_of_other_text_says_what_to_set(home, tmp_path):
    c = RunConfig(run_id='x', model=str(tiny(tmp_path/'m')), line=4, codexglue=4, thesis=4)
    with pytest.raises(ValueError, match='choose codexglue or thesis; as parameters, line and infill are then 0[.]$'): c.check()


def test_the_embedded_model_comes_back_from_gguf(tmp_path):
    model, (again, _) = load_model(BASE_MODEL), read_gguf(export_gguf(BASE_MODEL, tmp_path/'m.gguf', 'fp32'))
    ids = torch.arange(40)[None]
    with torch.no_grad(): torch.testing.assert_close(again(ids), model(ids))


def test_a_state_that_is_not_the_models_is_not_lost(tmp_path):
    from codegpt_nbc.engines.auto_model import DecoderForCausalLM
    model = DecoderForCausalLM.from_pretrained(tiny(tmp_path/'m'))
    zeros = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match='state_dict holds other tensors'): model.save_pretrained(tmp_path/'out', state_dict=zeros)
    with pytest.raises(ValueError, match='state_dict holds other tensors'): model.save_pretrained(tmp_path/'out', state_dict={})
    model.save_pretrained(tmp_path/'out', state_dict=model.state_dict())


def test_a_task_does_not_take_the_place_of_another(tmp_path):
    write_task(tmp_path/'task', n=2)
    with pytest.raises(FileExistsError, match='has the task codegpt_nbc_codexglue: choose another folder for codegpt_nbc_line'):
        write_task(tmp_path/'task', 'line', n=2)
    write_task(tmp_path/'task', n=3)
    assert len((tmp_path/'task'/'samples.jsonl').read_text().splitlines()) == 3


def test_a_table_of_raw_source_is_named(tmp_path):
    pd.DataFrame({'code': ['def f(x):\n    return x\n']*3}).to_parquet(tmp_path/'train.parquet')
    with pytest.raises(ValueError, match="train.parquet has no <EOL> in it"): list(code_lines(tmp_path, 'train'))
