"""OpenVINO with its own options (besides the cache's precision, which the IR says), for engines.py.

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
