"Builds the package from `settings.ini`, which is the only place where names, versions and requirements stand."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
readme = here/'README.md'

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], license='MIT', license_files=['LICENSE'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
    packages=find_packages(include=['asibkd', 'asibkd.*']),
    package_data={'asibkd': ['references.bib', 'tables/*.yaml', 'sweeps/*.yaml', 'presets/**/*.yaml', 'presets/*.yaml',
                             'notebooks/*.ipynb', 'notebooks/voila/templates/*/*', 'templates/*']},
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'onnx': cfg['onnx_requirements'].split(),
                    'mnist': cfg['mnist_requirements'].split(), 'hf': cfg['hf_requirements'].split(),
                    'track': cfg['track_requirements'].split(), 'sweep': cfg['sweep_requirements'].split(),
                    'slurm': cfg['slurm_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split()}, zip_safe=False,
    classifiers=['License :: OSI Approved :: MIT License', 'Programming Language :: Python :: 3', 'Framework :: Jupyter',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
