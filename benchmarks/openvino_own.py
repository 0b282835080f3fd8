"""OpenVINO with the options that it chooses by itself, for engines.py: a process that decodes as it is asked to.

python benchmarks/openvino_own.py FOLDER PRECISION
"""

import sys
from pathlib import Path

from skipless.serving import openvino
from skipless.serving.worker import serve

if __name__ == "__main__":
    folder, precision = sys.argv[1:]
    openvino.DECODING = {weights: {} for weights in openvino.DECODING}
    serve(lambda: openvino.Runner(Path(folder), precision))
