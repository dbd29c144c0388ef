"Package metadata, all of it read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
pythons = [f"3.{minor}" for minor in range(10, 14)]
if settings["min_python"] not in pythons: raise SystemExit(f"settings.ini: min_python {settings['min_python']} is none of {pythons}.")

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    author=settings["author"],
    url=settings["git_url"],
    license="Apache-2.0",
    classifiers=["Development Status :: 4 - Beta", "Intended Audience :: Developers", "Natural Language :: English",
                 "Operating System :: POSIX :: Linux", "Operating System :: MacOS"]
        + [f"Programming Language :: Python :: {p}" for p in pythons[pythons.index(settings["min_python"]):]],
    packages=find_packages(include=["colab_gpt2", "colab_gpt2.*"]),
    package_data={"colab_gpt2": ["py.typed", "assets/*.css", "assets/*.js", "assets/tiny/*"]},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={extra: settings[f"{extra}_requirements"].split() for extra in ("dev", "lora", "qlora", "peer", "browser")},
    entry_points={"console_scripts": settings["console_scripts"].split(), "nbdev": ["colab_gpt2=colab_gpt2._modidx:d"]},
    zip_safe=False,
)
