"A notebook in a browser, as its reader has it before her."
import contextlib, time
from dataclasses import dataclass

import nbformat

CLASSIC = dict(
    ready=".kernel_idle_icon", accept=".modal.in .btn-primary",
    interrupt="[data-jupyter-action='jupyter-notebook:interrupt-kernel']",
    run_all=("#celllink", "#run_all_cells"), save="button[title^='Save']", cell=".code_cell",
    prompt=".code_cell .input_prompt")
MODERN = dict(
    ready=".jp-Notebook-ExecutionIndicator[data-status=idle]", accept=".jp-Dialog .jp-mod-accept",
    interrupt="[data-command='notebook:interrupt-kernel']",
    run_all=(".lm-MenuBar-item:has-text('Run')", ".lm-Menu-item[data-command='runmenu:run-all']"),
    save="[data-command='docmanager:save']", cell=".jp-CodeCell", prompt=".jp-CodeCell .jp-InputPrompt")
BEGUN = "selector => [...document.querySelectorAll(selector)].some(prompt => /\\[\\*/.test(prompt.textContent))"
ALL_RAN = "selector => [...document.querySelectorAll(selector)].every(prompt => /\\[\\d+\\]/.test(prompt.textContent))"


@dataclass
class Notebook:
    "One notebook, opened by `server` in the playwright `page`; pictures go to the folder `shots`."
    page: object
    server: object
    name: str
    shots: object

    def __post_init__(self):
        self.at = CLASSIC if self.server.front_end.name == "notebook-6" else MODERN
        self.connected = False  # to the kernel, which has told what widgets it holds: the last question on opening
        self.complaints = []  # of the page's own scripts
        self.page.on("websocket", lambda socket: socket.on("framereceived", self.heard))
        self.page.on("console", self.complain)

    def complain(self, message):
        if message.type == "error": self.complaints.append(message.text)
    def open(self):
        self.page.goto(self.server.url(self.name))
        self.page.locator(self.at["cell"]).first.wait_for()
        self.wait_until(lambda: self.connected, 60)  # JupyterLab calls a kernel idle before it has reached it
        self.page.locator(self.at["ready"]).first.wait_for()
        return self

    def heard(self, frame):
        self.connected |= b"comm_info_reply" in (frame.encode() if isinstance(frame, str) else frame)

    def run_all(self):
        for step in self.at["run_all"]: self.page.locator(step).first.click()
        self.page.wait_for_function(BEGUN, arg=self.at["prompt"])

    def wait_until_run(self, seconds):
        "Until every code cell has its number. An error leaves those after it without."
        self.page.wait_for_function(ALL_RAN, arg=self.at["prompt"], timeout=seconds * 1000)

    def wait_until(self, condition, seconds=20):
        "Until `condition()` holds, for what is not on the page; -> what it then returned."
        end = time.monotonic() + seconds
        while not (met := condition()):
            assert time.monotonic() < end, f"not in {seconds} s"
            self.page.wait_for_timeout(100)
        return met

    def after_a_crash(self):
        """The front end says in a dialog that the kernel has died, and starts another.

        The new one publishes that it starts once. Often that is before the server listens again, and then the classic
        page shows no state until a cell runs: the kernel itself is asked, and not the page.
        """
        self.page.locator(self.at["accept"]).last.click(timeout=60_000)
        self.server.ask("")

    def interrupt(self):
        "■ of the toolbar."
        self.page.locator(self.at["interrupt"]).first.click()

    def saved(self):
        "The notebook as it is on the disk after a click on Save."
        path, before = self.server.folder/self.name, (self.server.folder/self.name).stat().st_mtime_ns
        def written():
            if path.stat().st_mtime_ns == before: return None
            with contextlib.suppress(ValueError): return nbformat.read(path, as_version=4)  # it is written in place
        self.page.locator(self.at["save"]).first.click()
        return self.wait_until(written)

    def panel(self, title):
        "The panel whose heading begins with `title`."
        return self.page.locator(".cg-panel").filter(has=self.page.get_by_role("heading", name=title)).first

    def set_theme(self, name):
        "By the menu of a front end that has themes."
        for menu in (".lm-MenuBar-item:has-text('Settings')", ".lm-Menu-item:has-text('Theme')",
                     f".lm-Menu-item:has(.lm-Menu-itemLabel:text-is('{name}'))"):
            self.page.locator(menu).first.click()
        self.page.locator(f"body[data-jp-theme-name='{name}']").wait_for(state="attached")

    def picture(self, name, of=None):
        "A screenshot of what is in sight, or of the locator `of`."
        (of or self.page).screenshot(path=self.shots/f"{self.server.front_end.name}-{name}.png")
