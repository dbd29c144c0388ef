"Bring the links that name this repository into step with settings.ini: the badges that open the tutorial in Colab and on Kaggle, where pip installs from, the README."
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("nbs/index.ipynb", "nbs/tutorials/colab_gpt2.ipynb", "nbs/tutorials/kaggle_gpt2.ipynb")


def links(user, repo, branch):
    "(pattern of any such link, what it reads here)."
    name = r"[\w.-]+"
    return ((rf"https://colab\.research\.google\.com/github/{name}/{name}/blob/[^\s\"]+?/nbs/", f"https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/nbs/"),
            (rf"git\+https://github\.com/{name}/{name}", f"git+https://github.com/{user}/{repo}"),
            (rf"https://github\.com/{name}/{name}/blob/[^\s\"]+?/nbs/", f"https://github.com/{user}/{repo}/blob/{branch}/nbs/"),
            (rf"https://github\.com/{name}/{name}#readme", f"https://github.com/{user}/{repo}#readme"))


if __name__ == "__main__":
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    for notebook in NOTEBOOKS:
        text = (ROOT/notebook).read_text(encoding="utf-8")
        for pattern, link in links(*(parser["DEFAULT"][name] for name in ("user", "repo", "branch"))): text = re.sub(pattern, link, text)
        (ROOT/notebook).write_text(text, encoding="utf-8")
