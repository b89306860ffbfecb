"""Package metadata comes from settings.ini, so that it is written once."""
from configparser import ConfigParser
from pathlib import Path
import setuptools

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
s = cfg['DEFAULT']
EXTRAS = {'notebooks': 'notebook', 'dev': 'dev', 'docs': 'docs', 'slurm': 'slurm', 'openvino': 'openvino', 'smollm2': 'smollm2'}
setuptools.setup(
    name=s['lib_name'], version=s['version'], description=s['description'], license='Apache-2.0',
    long_description=(Path(__file__).parent/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    python_requires=f">={s['min_python']}", install_requires=s['requirements'].split(),
    extras_require={name: s[f'{key}_requirements'].split() for name, key in EXTRAS.items()},
    packages=setuptools.find_packages(include=['codegpt_nbc', 'codegpt_nbc.*']), include_package_data=True,
    package_data={'codegpt_nbc': ['assets/**/*', '**/*.md', '**/*.yaml', '**/*.ipynb']},
    entry_points={'console_scripts': s['console_scripts'].split()},
)
