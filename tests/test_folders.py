"""Model folders that say two things, or something that the model does not have: refused in a sentence, not guessed."""
import shutil, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import save_file
sys.path.insert(0, str(Path(__file__).parent))
from test_rare import tiny
from codegpt_nbc.core.paths import BASE_MODEL, read_json, write_json
from codegpt_nbc.data.tokenizer import load_tokenizer
from codegpt_nbc.model.folder import config_of_shape, load_model, read_tensors, shape_of_config, special_ids
from codegpt_nbc.model.layers import Shape


@pytest.fixture
def said_twice(tmp_path):
    "A folder, its tensors and its configuration, to be changed."
    folder = tiny(tmp_path/'m')
    return folder, read_tensors(folder), read_json(folder/'config.json')


def rewritten(folder, tensors, config):
    save_file({name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, folder/'model.safetensors')
    write_json(folder/'config.json', config)
    return folder


def test_a_head_of_its_own_beside_tied_embeddings_is_no_riddle(said_twice):
    folder, tensors, config = said_twice
    lookup = tensors['transformer.wte.weight']
    same = load_model(rewritten(folder, tensors | {'lm_head.weight': lookup.clone()}, config))
    assert torch.equal(same.tokens.weight, lookup)
    with pytest.raises(ValueError, match="another 'lm_head.weight': write 'tie_word_embeddings': false"):
        load_model(rewritten(folder, tensors | {'lm_head.weight': lookup + 1}, config))
    free = load_model(rewritten(folder, tensors | {'lm_head.weight': lookup + 1}, config | {'tie_word_embeddings': False}))
    assert torch.equal(free.tokens.head.weight, lookup + 1)


def test_weights_that_are_no_models_are_not_believed(said_twice):
    folder, tensors, config = said_twice
    free = config | {'tie_word_embeddings': False}
    with pytest.raises(ValueError, match="lack the tensor 'lm_head.weight'"):
        load_model(rewritten(folder, tensors | {'weight': tensors['transformer.wte.weight']}, free))
    with pytest.raises(ValueError, match='holds integers without a quantization_config'):
        load_model(rewritten(folder, tensors | {'transformer.wte.weight': tensors['transformer.wte.weight'].to(torch.int8)}, config))
    with pytest.raises(ValueError, match="'tie_word_embeddings' in config.json is 'false'"):
        shape_of_config(config | {'tie_word_embeddings': 'false'})
    (folder/'model.safetensors').rename(folder/'a.safetensors')
    save_file({'transformer.wte.weight': torch.zeros(2, 2)}, folder/'z.safetensors')
    with pytest.raises(ValueError, match='lies in .*z.safetensors and in another file beside it'): read_tensors(folder)


def test_scaling_that_a_family_ignores_is_refused():
    config = config_of_shape(Shape(64, 32, 16, 8, (2, 2), (32, 32), 'gptj', tied=False))
    assert shape_of_config(config)[0].scaling is None
    with pytest.raises(ValueError, match="a gptj model does not scale rotary positions: remove 'linear'"):
        shape_of_config(config | {'rope_scaling': {'rope_type': 'linear', 'factor': 2.}})


def test_special_tokens_that_are_objects_are_tokens(tmp_path):
    write_json(tmp_path/'tokenizer_config.json', {'bos_token': {'__type': 'AddedToken', 'content': '<s>'}, 'eos_token': '</s>'})
    shutil.copy(BASE_MODEL/'tokenizer.json', tmp_path)
    tok = load_tokenizer(tmp_path)
    assert special_ids(tmp_path) == {'bos_token_id': tok.token_to_id('<s>'), 'eos_token_id': tok.token_to_id('</s>')}
