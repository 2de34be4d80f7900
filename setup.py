"""pyproject.toml says everything; this adds the small data files, which lie beside the package in a checkout, to a wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
SHIPPED = {"paper": "*", "predictors": "*.safetensors"}  # checkpoints are large: `dyrate fetch` brings them


class BuildWithData(build_py):
    """build_py, and data/paper and data/predictors as dyrate_lib/_data; an editable install reads them where they lie."""

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return
        for folder, pattern in SHIPPED.items():
            target = Path(self.build_lib) / "dyrate_lib" / "_data" / folder
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for file in sorted((HERE / "data" / folder).glob(pattern)):
                shutil.copyfile(file, target / file.name)


setup(cmdclass={"build_py": BuildWithData})
