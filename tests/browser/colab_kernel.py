"An ipykernel that answers as Colab's: `python colab_kernel.py -f CONNECTION_FILE`; google.colab is the stub."
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from ipykernel.zmqshell import ZMQInteractiveShell


class Shell(ZMQInteractiveShell):
    "Named as the real one is: `str(get_ipython())` is what tells Colab from other places."


Shell.__module__ = "google.colab._shell"


class ColabKernel(IPythonKernel):
    shell_class = Shell


if __name__ == "__main__": IPKernelApp.launch_instance(kernel_class=ColabKernel)
