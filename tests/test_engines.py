"""The embedded model writes the same lines, whatever engine runs it; weights of any size."""
import os, shutil, subprocess, sys, tempfile
from pathlib import Path
import numpy as np, onnx, pytest, torch
from codegpt_nbc.core import paths
from codegpt_nbc.core.paths import BASE_MODEL, CORPUS
from codegpt_nbc.data.samples import load_samples
from codegpt_nbc.engines import onnx_export, onnx_run
from codegpt_nbc.engines.generate import complete_batch, greedy, open_engine
from codegpt_nbc.engines.onnx_export import count_onnx_parameters, export_onnx
from codegpt_nbc.engines.onnx_run import DATA_FILE, OrtEngine
from codegpt_nbc.engines.pytorch import TorchEngine
from codegpt_nbc.evidence.evaluate import size_of, weight_files
from codegpt_nbc.methods import quantize as methods_quantize
from codegpt_nbc.methods.quantize import PRECISIONS, quantize
from codegpt_nbc.methods.schemes import weight_schemes
from codegpt_nbc.model.decoder import Decoder, count_of
from codegpt_nbc.model.folder import load_model, save_model
from codegpt_nbc.model.layers import Shape

PROMPTS = load_samples('codexglue', 8, 'test', CORPUS).input
MORE = load_samples('codexglue', 40, 'test', CORPUS).input


def texts(folder, prompts=PROMPTS): return complete_batch(*open_engine(folder, threads=1), prompts, 48)


@pytest.fixture(scope='module')
def dense(): return texts(BASE_MODEL)


def test_onnx_fp32_writes_what_pytorch_writes(dense, tmp_path): assert texts(export_onnx(BASE_MODEL, tmp_path/'onnx')) == dense


@pytest.mark.parametrize('bits, precision', [(8, 'int8'), (4, 'int4')])
def test_onnx_with_float_inputs_writes_what_pytorch_writes_from_the_same_codes(bits, precision, tmp_path):
    folder = save_model(quantize(load_model(BASE_MODEL), *weight_schemes(bits)), tmp_path/'q')
    assert texts(export_onnx(folder, tmp_path/'onnx', precision, 1)) == texts(folder)


def test_int8_changes_few_texts(tmp_path):
    "Nine of ten stay; which ones depends on the processor."
    int8 = texts(export_onnx(BASE_MODEL, tmp_path/'onnx', 'int8'), MORE)
    assert sum(a == b for a, b in zip(int8, texts(BASE_MODEL, MORE))) >= 31


# Weights that do not fit into one file

LLAMA = Shape(512, 64, 64, 16, (2,)*12, (96,)*12, 'llama', queries=2, tied=False)
LARGE = Path('/sys/kernel/mm/transparent_hugepage/enabled')
IDS = [np.random.default_rng(i).integers(0, 512, n).tolist() for i, n in enumerate((1, 3, 30, 7, 20))]


@pytest.fixture(params=[Shape(512, 64, 64, 16, (4,)*12, (128,)*12), LLAMA], ids=['gpt2', 'llama'])
def model(request):
    m = Decoder(request.param).init_weights()
    for p in m.parameters(): p.data = 6*p if p.ndim == 2 else p + .1*torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return m


def both_ways(source, out, precision, monkeypatch):
    "The same export in one file and in two."
    whole = export_onnx(source, out/f'{precision}-one', precision)
    monkeypatch.setattr(onnx_export, 'ONE_FILE', 10_000)
    return whole, export_onnx(source, out/f'{precision}-two', precision)


@pytest.mark.parametrize('precision', PRECISIONS)
def test_a_file_of_weights_changes_nothing(precision, model, tmp_path, monkeypatch):
    one, two = both_ways(save_model(model, tmp_path/'m'), tmp_path, precision, monkeypatch)
    assert not (one/DATA_FILE).exists() and (two/'model.onnx').stat().st_size < .6*(one/'model.onnx').stat().st_size
    assert weight_files(two) == [two/'model.onnx', two/DATA_FILE]
    assert size_of(two).params == size_of(one).params and size_of(two).nonzero_params == size_of(one).nonzero_params
    assert size_of(two).raw_bytes > .9*size_of(one).raw_bytes
    written = [greedy(OrtEngine(f, threads=1), IDS, 12, 5) for f in (one, two)]
    assert written[0] == written[1]
    moved = shutil.copytree(two, tmp_path/'elsewhere')
    assert greedy(OrtEngine(moved, threads=1), IDS, 12, 5) == written[0]


@pytest.mark.parametrize('precision', PRECISIONS)
def test_a_layer_has_one_product_for_queries_keys_and_values(precision, tmp_path):
    graph = onnx.load(export_onnx(save_model(Decoder(LLAMA).init_weights(), tmp_path/'m'), tmp_path/'onnx', precision)/'model.onnx').graph
    products = [n for n in graph.node if n.op_type in ('MatMul', 'MatMulIntegerToFloat', 'MatMulNBits', 'Gemm')]
    assert len(products) == 5*len(LLAMA.heads) + 1   # qkv, proj, gate, up and down, and the head
    assert all(a.f == 1 for n in graph.node if n.op_type == 'GroupQueryAttention' for a in n.attribute if a.name == 'scale')


OPENS = """import mmap, sys
from codegpt_nbc.engines.onnx_run import OrtEngine
def in_large_pages():   # kB of this process
    return sum(int(line.split()[1]) for line in open('/proc/self/smaps_rollup') if line.startswith('AnonHugePages'))
before = in_large_pages()
probe = mmap.mmap(-1, 2**25, mmap.MAP_PRIVATE)
probe.madvise(mmap.MADV_HUGEPAGE)
probe.write(bytes(2**25))
given = in_large_pages()
engine = OrtEngine(sys.argv[1], threads=1)
print(given - before, in_large_pages() - given, engine.vocab)
"""


@pytest.mark.skipif(not LARGE.is_file() or '[never]' in LARGE.read_text(), reason='this system has no large pages')
def test_the_weights_of_a_session_lie_in_large_pages(tmp_path):
    model = Decoder(Shape(512, 64, 512, 64, (8,)*8, (2048,)*8)).init_weights()
    folder = export_onnx(save_model(model, tmp_path/'m'), tmp_path/'onnx', 'int8')
    # In a process of its own: in this one, the session may get memory that another one has left in large pages
    opened = subprocess.run([sys.executable, '-c', OPENS, str(folder)], capture_output=True, text=True, check=True)
    probe, gained, vocab = map(int, opened.stdout.split())
    if probe < 2**14: pytest.skip('this system has no large pages left now')
    assert gained > 8*1024 and vocab == 512   # kB, of 25 MB


@pytest.mark.parametrize('damage', ['missing', 'short'])
def test_a_damaged_file_of_weights_is_one_sentence(damage, model, tmp_path, monkeypatch):
    _, two = both_ways(save_model(model, tmp_path/'m'), tmp_path, 'int4', monkeypatch)
    data = two/DATA_FILE
    if damage == 'missing': data.unlink()
    else: data.write_bytes(data.read_bytes()[:-5000])
    for call in (OrtEngine, size_of):
        with pytest.raises(ValueError, match='model.onnx.data is missing(,| or) truncated'): call(two)


def test_no_room_for_the_graph_for_prompts_is_one_sentence(model, tmp_path, monkeypatch):
    folder, before = export_onnx(save_model(model, tmp_path/'m'), tmp_path/'onnx', 'int4'), set(tmp_path.iterdir())
    def full(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    with monkeypatch.context() as m:
        m.setattr(onnx_run, 'prompt_graph', full)
        with pytest.raises(OSError, match=r'temporary folder \(No space left on device\): free room there, or let TMPDIR'):
            OrtEngine(folder)
        m.setattr(tempfile, 'tempdir', str(folder/'nowhere'))
        with pytest.raises(OSError, match='let TMPDIR name another folder'): OrtEngine(folder)
    assert OrtEngine(folder).context == model.shape.context and set(tmp_path.iterdir()) == before


@pytest.mark.skipif(not os.environ.get('CODEGPT_NBC_LARGE'), reason='takes 8 GB of memory and minutes: set CODEGPT_NBC_LARGE=1')
def test_a_graph_of_more_than_two_gib(tmp_path):
    shape = Shape(151_936, 64, 896, 64, (2,)*24, (4864,)*24, 'llama', queries=7, tied=False)
    folder = export_onnx(save_model(Decoder(shape).init_weights(), tmp_path/'m', dtype=torch.bfloat16), tmp_path/'onnx')
    assert (folder/DATA_FILE).stat().st_size > 2**31
    assert count_onnx_parameters(folder/'model.onnx')[0] == count_of(shape)
    written = greedy(OrtEngine(folder), IDS, 4, -1)
    assert written == greedy(TorchEngine(tmp_path/'m'), IDS, 4, -1)


# Shapes of Qwen2.5-Coder: parameters in billions, GB of memory at most
QWEN = {.5: (Shape(151_936, 2048, 896, 64, (2,)*24, (4864,)*24, 'qwen2', queries=7), 4),
        1.5: (Shape(151_936, 2048, 1536, 128, (2,)*28, (8960,)*28, 'qwen2', queries=6), 12)}


def peak(code: str) -> float:
    "GB that Python takes at most while it runs `code`."
    # Linux's own figure, in kB: that of `resource` counts what a parent took when it forked, too
    code += '\nimport re; print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])/1e6)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert not done.returncode, done.stderr[-2000:]
    return float(done.stdout.split()[-1])


@pytest.mark.skipif(not os.environ.get('CODEGPT_NBC_LARGE'), reason='takes 12 GB of memory and minutes: set CODEGPT_NBC_LARGE=1')
@pytest.mark.parametrize('billions', QWEN)
def test_memory_of_large_exports(billions, tmp_path):
    shape, most = QWEN[billions]
    torch.set_default_dtype(torch.bfloat16)
    try: save_model(Decoder(shape).init_weights(), tmp_path/'m', dtype=torch.bfloat16)
    finally: torch.set_default_dtype(torch.float32)
    took = {'load': peak(f'from codegpt_nbc.model.folder import load_model; load_model({str(tmp_path/"m")!r})')}
    for precision in ('int8', 'int4'):
        out = tmp_path/precision
        took[f'export {precision}'] = peak('from codegpt_nbc.engines.onnx_export import export_onnx\n'
                                           f'export_onnx({str(tmp_path/"m")!r}, {str(out)!r}, {precision!r})')
        took[f'read 512 {precision}'] = peak('import numpy as np; from codegpt_nbc.engines.onnx_run import OrtEngine\n'
                                             f'e = OrtEngine({str(out)!r}); e.start(1, 528)\n'
                                             'e.prefill(np.arange(512)[None], np.array([512]))')
        took[f'file {precision}'] = sum(f.stat().st_size for f in weight_files(out))/1e9
    print(f'{billions} billion parameters, GB:', {what: round(gb, 2) for what, gb in took.items()})
    assert max(took.values()) < most


def test_freed_weights_go_back_to_the_system(tmp_path):
    """124 M parameters in 4 bits: 90 MB of weights beside a graph, 85 more in 8 bits for prompts, no third copy. 0.66 GB before that,
    0.53 while the weights of 8 bits were given to the runtime in memory, 0.41 from a file that it maps."""
    save_model(Decoder(Shape(50_257, 1024, 768, 64, (12,)*12, (3072,)*12)).init_weights(), tmp_path/'m')
    folder = export_onnx(tmp_path/'m', tmp_path/'onnx', 'int4')
    assert (folder/DATA_FILE).stat().st_size > 80e6
    taken = peak('import numpy as np; from codegpt_nbc.engines.onnx_run import OrtEngine\n'
                 f'e = OrtEngine({str(folder)!r}, threads=1); e.start(1, 528)\n'
                 'e.step(e.prefill(np.arange(512)[None], np.array([512])).argmax(1))')
    assert taken < .45


# Models that do not fit into the memory

def test_a_model_too_large_for_the_memory_is_one_sentence_before_work_begins(model, tmp_path, monkeypatch):
    source = save_model(model, tmp_path/'m')
    folder = export_onnx(source, tmp_path/'onnx', 'int4')
    monkeypatch.setattr(paths, 'free_memory', lambda: 10_000)
    for call in (lambda: load_model(source), lambda: export_onnx(source, tmp_path/'x', 'int8'), lambda: OrtEngine(folder)):
        with pytest.raises(paths.MemoryShort, match=r'takes 0\.\d\d GB of memory, but 0\.00 GB are free: end other programs'): call()
    assert not (tmp_path/'x').exists()


def test_where_the_free_memory_is_unknown_work_begins(model, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, 'free_memory', lambda: None)
    load_model(save_model(model, tmp_path/'m'))


def test_free_memory_does_without_psutil(monkeypatch):
    monkeypatch.setitem(sys.modules, 'psutil', None)
    assert paths.free_memory() is None or paths.free_memory() > 0


@pytest.mark.parametrize('bits', [8, 4])
def test_matrices_rounded_in_parts_are_the_same(bits, model, tmp_path, monkeypatch):
    whole = quantize(model, *weight_schemes(bits, symmetric=False)).state_dict()
    monkeypatch.setattr(methods_quantize, 'AT_ONCE', 1000)
    parts = quantize(model, *weight_schemes(bits, symmetric=False)).state_dict()
    assert whole.keys() == parts.keys() and all(torch.equal(t, parts[name]) for name, t in whole.items())


@pytest.mark.parametrize('precision', PRECISIONS)
def test_bfloat16_is_exported_as_its_floats_are(precision, model, tmp_path):
    halves = save_model(model, tmp_path/'bf16', dtype=torch.bfloat16)
    floats = save_model(load_model(halves), tmp_path/'fp32', dtype=torch.float32)
    made = [export_onnx(f, tmp_path/f'{f.name}-onnx', precision)/'model.onnx' for f in (halves, floats)]
    assert made[0].read_bytes() == made[1].read_bytes()
