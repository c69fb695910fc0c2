"""Which weights of every transformers architecture become 2:4, and why the others stay dense.

    python benchmarks/survey.py              # all model types of the installed transformers, on the meta device
    python benchmarks/survey.py llama t5     # some

What a default config cannot build is skipped with the reason. Results go to results/survey_transformers_VERSION.json:
for each type the projection weight in numbered layers that is selected, by role, and what is not, by reason and by the
last parts of the names.
"""

import argparse
import json
import sys
from multiprocessing import Pool
from pathlib import Path

import transformers
from common import RESULTS, conditions
from transformers import CONFIG_MAPPING
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.architectures import survey


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    types = arguments.types or sorted(CONFIG_MAPPING.keys())
    with Pool(2) as pool:
        rows = pool.map(survey, types, chunksize=4)
    if arguments.types:
        print(json.dumps(rows, indent=1))
        return
    file = RESULTS / f"survey_transformers_{transformers.__version__}.json"
    file.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
