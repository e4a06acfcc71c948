"""Everything comes from settings.ini, so that a version or a requirement stands in one place."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
development = settings["dev_requirements"].split()

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="MIT",
    keywords=settings["keywords"],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["mnist_nb", "mnist_nb.*"]),
    package_data={"mnist_nb": ["templates/**/*", "static/**/*"]},
    install_requires=settings["requirements"].split(),
    extras_require={"dev": development, "tensorboard": [line for line in development if line.startswith("tensorboard")]},
    entry_points={"console_scripts": settings["console_scripts"].split()},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
