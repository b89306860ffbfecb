"""Package metadata comes from settings.ini, so that it is written once."""
import hashlib, shutil
from configparser import ConfigParser
from pathlib import Path
import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
try: from setuptools.command.bdist_wheel import bdist_wheel
except ImportError: from wheel.bdist_wheel import bdist_wheel   # before setuptools 70

# What the package reads beside its code, see `core.paths.shared`
SHARED = ('configs/*.yaml', 'configs/*.txt', 'configs/slurm/*.yaml', 'nbs/experiments/*.ipynb', 'Snakefile')


class BuildWithShared(build_py):
    "A wheel carries recipes, profiles and templates."
    def run(self):
        if not self.editable_mode: shutil.rmtree(self.build_lib, ignore_errors=True)   # or modules that are gone would be packed again
        super().run()
        here, share = Path(__file__).parent, Path(self.build_lib)/'codegpt_nbc'/'share'
        for source in (p for pattern in SHARED for p in here.glob(pattern)):
            target = share/source.relative_to(here)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


class BuildKernels(build_ext):
    "The library is loaded with ctypes and knows nothing of Python, so its name does not, either."
    def get_ext_filename(self, name): return f"{name.replace('.', '/')}.so"
    def get_export_symbols(self, ext): return ext.export_symbols


class WheelForAnyPython(bdist_wheel):
    def get_tag(self): return ('py3', 'none', super().get_tag()[2])


SOURCES = ('causal_gradients', 'causal_attention', 'attention_tiles', 'attention_registers')
CSRC = sorted(p for p in (Path(__file__).parent/'codegpt_nbc'/'csrc').iterdir() if p.suffix in ('.cpp', '.h'))
DIGEST = hashlib.sha256(b''.join(p.read_bytes() for p in CSRC)).hexdigest()   # see `core.native.sources`
KERNELS = setuptools.Extension(   # optional: without a compiler the package works, and is slower
    'codegpt_nbc._kernels', [f'codegpt_nbc/csrc/{name}.cpp' for name in SOURCES],
    depends=[f'codegpt_nbc/csrc/{p.name}' for p in CSRC], optional=True, language='c++', define_macros=[('BUILT_FROM', f'"{DIGEST}"')],
    extra_compile_args=['-O3', '-fopenmp', '-w'], extra_link_args=['-fopenmp'])

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
s = cfg['DEFAULT']
EXTRAS = {'notebooks': 'notebook'} | {name: name for name in ('dev', 'docs', 'slurm', 'openvino', 'serve', 'smollm2')}
setuptools.setup(
    name=s['lib_name'], version=s['version'], description=s['description'], license='Apache-2.0',
    long_description=(Path(__file__).parent/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    python_requires=f">={s['min_python']}", install_requires=s['requirements'].split(),
    extras_require={name: s[f'{key}_requirements'].split() for name, key in EXTRAS.items()},
    packages=setuptools.find_packages(include=['codegpt_nbc', 'codegpt_nbc.*']), include_package_data=True,
    package_data={'codegpt_nbc': ['assets/**/*', '**/*.md', '**/*.yaml', '**/*.ipynb']},
    ext_modules=[KERNELS],
    cmdclass={'build_py': BuildWithShared, 'build_ext': BuildKernels, 'bdist_wheel': WheelForAnyPython},
    entry_points={'console_scripts': s['console_scripts'].split()},
)
