"The pump in a real kernel: a click during a cell is handled at once, and the cells that wait keep their order."
import time

import pytest

pytest.importorskip("jupyter_client")
from jupyter_client.manager import start_new_kernel

LOOP = """
import threading, time
from colab_gpt2.panels.pump import interrupts_reach, pump
asked, steps = [], 0
def loop():
    global steps
    print("looping in", threading.current_thread().name, flush=True)
    for steps in range(1, 3001):
        time.sleep(0.02)
        pump()
        if asked: break
    print(f"ended after {steps} steps", flush=True)
"""
BUTTONS = """
import ipywidgets as widgets
stop, start, other = (widgets.Button(description=name) for name in ("Stop", "Start", "Other"))
slider = widgets.IntSlider()
stop.on_click(lambda _: asked.append(True))
def start_loop(_):
    with interrupts_reach(lambda: asked.append(True)): loop()
start.on_click(start_loop)
def touch(_):
    for button in (stop, start): button.tooltip = "touched"
other.on_click(touch)
slider.observe(lambda change: print("slider at", change["new"], flush=True), "value")
print(stop.model_id, start.model_id, slider.model_id, other.model_id)
"""


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=180)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.fixture
def buttons(kernel):
    said = run(kernel, LOOP + BUTTONS)
    return dict(zip(("stop", "start", "slider", "other"), said.split()))


def listen(client, until, timeout=120):
    "Messages of the kernel up to the first that `until` accepts, which is the last of the list."
    heard, end = [], time.monotonic() + timeout
    while not heard or not until(heard[-1]):
        heard.append(client.get_iopub_msg(timeout=max(end - time.monotonic(), 0.01)))
    return heard


def is_idle(message): return message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"


def idle(message_id):
    "Whether a message says that the work for `message_id` has ended."
    return lambda message: is_idle(message) and message["parent_header"].get("msg_id") == message_id


def printed(messages, message_id=None):
    "What the messages print, or those of them that belong to `message_id`."
    streams = [m for m in messages if m["msg_type"] == "stream"]
    return "".join(m["content"]["text"] for m in streams if message_id in (None, m["parent_header"]["msg_id"]))


def run(client, code):
    message_id = client.execute(code)
    heard = listen(client, idle(message_id))
    assert not [m["content"]["ename"] for m in heard if m["msg_type"] == "error"]
    return printed(heard)


def send(client, comm_id, data, subshell=None):
    message = client.session.msg("comm_msg", dict(comm_id=comm_id, data=data))
    if subshell: message["header"]["subshell_id"] = subshell
    client.shell_channel.send(message)
    return message["header"]["msg_id"]


def click(client, comm_id, subshell=None):
    return send(client, comm_id, dict(method="custom", content=dict(event="click")), subshell)


def looping(message): return message["msg_type"] == "stream" and "looping" in message["content"]["text"]


@pytest.mark.parametrize("where", ["a cell", "a callback"])
def test_a_click_is_handled_in_the_middle_and_cells_wait(kernel, buttons, where):
    running = kernel.execute("loop()") if where == "a cell" else click(kernel, buttons["start"])
    listen(kernel, looping)
    waiting = [kernel.execute(f"print('cell {n}:', steps)") for n in (1, 2)]
    clicked = click(kernel, buttons["stop"])
    heard = listen(kernel, idle(waiting[-1]))
    said = printed(heard).splitlines()
    steps = int(said[0].split()[2])
    assert steps < 2500, said  # of 3000, the whole loop takes a minute: room for a busy machine
    assert said == [f"ended after {steps} steps", f"cell 1: {steps}", f"cell 2: {steps}"]
    assert printed(heard, running) == f"ended after {steps} steps\n"  # the output belongs to its own cell again
    order = [m["parent_header"]["msg_id"] for m in heard if is_idle(m)]
    assert order == [clicked, running, *waiting]


@pytest.fixture
def subshell(kernel, buttons):
    """JupyterLab has widgets' messages handled in one: the loop that a click starts, and the click that ends it.
    ipykernel 7.4 sends there what belongs to widgets that a message from there has changed, as a panel's buttons are
    when any of them is pressed."""
    known = kernel.kernel_info(reply=True, timeout=30)["content"].get("supported_features", [])
    if "kernel subshells" not in known: pytest.skip("this ipykernel is older than subshells, 7.0")
    kernel.control_channel.send(kernel.session.msg("create_subshell_request"))
    subshell = kernel.get_control_msg(timeout=120)["content"]["subshell_id"]
    listen(kernel, idle(click(kernel, buttons["other"], subshell)))
    yield subshell
    kernel.control_channel.send(kernel.session.msg("delete_subshell_request", dict(subshell_id=subshell)))
    kernel.get_control_msg(timeout=120)


def steps_taken(kernel):
    "How many of the loop's 3000 steps, once it has said so."
    ended = listen(kernel, lambda m: m["msg_type"] == "stream" and "ended after" in m["content"]["text"])[-1]
    return int(ended["content"]["text"].split()[2])


def test_a_click_is_handled_in_a_subshell(kernel, buttons, subshell):
    click(kernel, buttons["start"], subshell)
    assert f"looping in subshell-{subshell}" in printed(listen(kernel, looping))
    click(kernel, buttons["stop"], subshell)
    assert steps_taken(kernel) < 2500


def interrupt_by_signal(kernel): kernel.parent.interrupt_kernel()


def interrupt_by_message(kernel): kernel.control_channel.send(kernel.session.msg("interrupt_request", {}))


@pytest.mark.parametrize("press", [interrupt_by_signal, interrupt_by_message])
def test_the_interrupt_button_reaches_a_subshell(kernel, buttons, subshell, press):
    "Also after a cell, for which the kernel sets its own handler; after the loop a cell can be interrupted as before."
    click(kernel, buttons["start"], subshell)
    assert f"looping in subshell-{subshell}" in printed(listen(kernel, looping))
    run(kernel, "import signal")
    time.sleep(1.5)  # the handler is looked after twice a second
    press(kernel)
    assert steps_taken(kernel) < 2500
    naps = "for _ in range(4000): time.sleep(0.05)"  # a signal just before one long sleep would be heard after it
    sleeping = kernel.execute(f"print('asleep', flush=True)\n{naps}")
    listen(kernel, lambda m: m["msg_type"] == "stream" and "asleep" in m["content"]["text"])
    press(kernel)
    heard = listen(kernel, idle(sleeping), timeout=120)
    assert [m["content"]["ename"] for m in heard if m["msg_type"] == "error"] == ["KeyboardInterrupt"]


def test_the_browser_hears_that_each_change_was_dealt_with(kernel, buttons):
    "Else it would send no further change of that widget."
    running = kernel.execute("loop()")
    listen(kernel, looping)
    updates = [dict(method="update", state=dict(value=n), buffer_paths=[]) for n in (7, 8)]
    changes = [send(kernel, buttons["slider"], update) for update in updates]
    click(kernel, buttons["stop"])
    heard = listen(kernel, idle(running))
    said = printed(heard)
    assert said.index("slider at 7") < said.index("slider at 8") < said.index("ended after")
    for change in changes: assert any(idle(change)(m) for m in heard)


def test_a_page_that_is_opened_in_mid_run_learns_which_widgets_there_are(kernel, buttons):
    "JupyterLab asks which kernel this is, then which widgets there are, and shows none before it knows."
    running = kernel.execute("loop()")
    listen(kernel, looping)
    for ask, kind in ((kernel.kernel_info, "kernel_info_reply"), (kernel.comm_info, "comm_info_reply")):
        question = ask()
        while (answer := kernel.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != question:
            pass  # of the tests before
        assert answer["msg_type"] == kind
    assert buttons["stop"] in answer["content"]["comms"]
    click(kernel, buttons["stop"])
    assert steps_taken(kernel) < 2500
    listen(kernel, idle(running))


def test_an_empty_pump_sends_nothing(kernel, buttons):
    "It is called at every step, which would be a message to the browser each."
    message_id = kernel.execute("print([pump() for _ in range(3)])")
    heard = listen(kernel, idle(message_id))
    assert printed(heard) == "[0, 0, 0]\n"
    assert [m["content"]["execution_state"] for m in heard if m["msg_type"] == "status"] == ["busy", "idle"]
