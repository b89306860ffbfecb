"""A GGUF file, written with the package gguf and read as a model folder is: the same logits, the same token ids."""
import json
import pytest, torch
from codegpt_nbc.model.convert_format import read_gguf
from codegpt_nbc.model.decoder import Decoder
from codegpt_nbc.model.layers import Shape
from codegpt_nbc.model.folder import to_disk
from codegpt_nbc.data.tokenizer import encode_batch, train_tokenizer

gguf = pytest.importorskip('gguf', reason='no package gguf: call make smollm2')


def halves_to_pairs(w, heads): # llama.cpp turns neighbouring channels, transformers the two halves of a head
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(w.shape)


def write(path, model, tok):
    s, w = model.shape, gguf.GGUFWriter(path, 'llama')
    about = dict(context_length=s.context, embedding_length=s.d_model, block_count=s.n_layer,
                 feed_forward_length=s.inner[0], head_count=s.heads[0]*s.queries, head_count_kv=s.heads[0],
                 layer_norm_rms_eps=s.eps, rope_dimension_count=s.d_head, rope_freq_base=s.theta, vocab_size=s.vocab)
    vocab, merges = (json.loads(tok.to_str())['model'][k] for k in ('vocab', 'merges'))
    added = {i: t.content for i, t in tok.get_added_tokens_decoder().items()}
    words = {i: t for t, i in vocab.items()} | added
    about |= dict(tokenizer_model='gpt2', tokenizer_pre='gpt-2', token_list=[words[i] for i in range(s.vocab)],
                  token_types=[3 if i in added else 1 for i in range(s.vocab)],
                  token_merges=[' '.join(m) for m in merges], bos_token_id=0, eos_token_id=1)
    for what, value in about.items(): getattr(w, f'add_{what}')(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, s.n_layer)
    for name, t in to_disk(model).items():
        heads = {'q_proj': s.heads[0]*s.queries, 'k_proj': s.heads[0]}.get(name.split('.')[-2])
        w.add_tensor(names.get_name(name, ('.weight',)), (halves_to_pairs(t, heads) if heads else t).detach().numpy().copy())
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close): step()


@pytest.mark.parametrize('queries', [1, 2])
def test_what_is_written_is_read(tmp_path, queries):
    tok = train_tokenizer(['def f ( x ) : <EOL> return x'], [], 300)
    n = tok.get_vocab_size()
    shape = Shape(n, 64, 32*queries, 16, (2, 2), (48, 48), 'llama', queries=queries,
                  eps=2**-20, theta=5e4)   # both exact in float32, as the file has them
    model = Decoder(shape).init_weights().eval()
    for p in model.parameters(): p.data *= 1 + 7*(p.ndim == 2)   # so that every part matters
    write(tmp_path/'m.gguf', model, tok)
    again, words = read_gguf(tmp_path/'m.gguf')
    assert again.shape == model.shape
    ids = torch.randint(n, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): torch.testing.assert_close(again(ids), model(ids))
    text = 'def g ( y ) : return f ( y )'
    assert encode_batch(words, [text]) == encode_batch(tok, [text])
