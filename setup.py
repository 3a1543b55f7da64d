"""Install turbvit_nb as `settings.ini` describes it."""
from configparser import ConfigParser
from pathlib import Path
from shutil import copyfile, rmtree

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
deploy = cfg["deploy_requirements"]

# What travels in the package besides its modules: `lab.config.nbs_dir` finds it there where no checkout is.
NOTEBOOKS = ("[0-9][0-9]_*.ipynb", "configs/**/*.toml", "jobs/*")


class BuildWithNotebooks(build_py):
    "Copies the chapters, their configs and the job scripts into the built package; an editable install needs no copy."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / cfg["lib_name"] / "_nbs"
        rmtree(package, ignore_errors=True)  # of an earlier build
        for path in sorted(path for pattern in NOTEBOOKS for path in (here / "nbs").glob(pattern)):
            target = package / path.relative_to(here / "nbs")
            target.parent.mkdir(parents=True, exist_ok=True)
            copyfile(path, target)


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
    cmdclass={"build_py": BuildWithNotebooks},
    package_data={cfg["lib_name"]: ["registry.toml"]},
    packages=find_packages(include=[cfg["lib_name"], f"{cfg['lib_name']}.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": (cfg["dev_requirements"] + " " + deploy).split(), "deploy": deploy.split(), "tracking": cfg["tracking_requirements"].split()},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
