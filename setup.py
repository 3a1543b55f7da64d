"""Install turbvit_nb as `settings.ini` describes it."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

# The seam by which a chapter owns its section of the config: `lab.config` finds the schemas here.
sections = {
    "model": "model:ModelConfig",
    "dataset": "datasets:DatasetConfig",
    "train_dataset": "datasets:DatasetConfig",
    "validation_dataset": "datasets:DatasetConfig",
    "test_dataset": "datasets:DatasetConfig",
    "climo_dataset": "datasets:DatasetConfig",
    "generate": "datasets:GenerateConfig",
    "training": "train:TrainingConfig",
    "pruning": "prune:PruningConfig",
    "finetuning": "prune:FinetuningConfig",
    "distillation": "prune:DistillationConfig",
    "inference": "inference:InferenceConfig",
    "analysis": "climate.keys:AnalysisConfig",
    "compare": "compare:CompareConfig",
}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3.11",
    ],
    packages=find_packages(include=[cfg["lib_name"], f"{cfg['lib_name']}.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
        "turbvit.sections": [f"{name} = {cfg['lib_name']}.{where}" for name, where in sections.items()],
    },
    zip_safe=False,
)
