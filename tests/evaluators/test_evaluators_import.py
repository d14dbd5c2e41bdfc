import subprocess
import sys

HEAVY = "{'torch', 'transformers', 'datasets', 'lm_eval', 'numpy', 'ray'}"


def test_checking_names_imports_nothing_heavy():
    code = (
        "import sys, evaluators, evaluators.corpora as c, evaluators.harness as h\n"
        "c.Corpus.parse('lambada'); h.check_task('piqa'); h.check_task('cmmlu'); h.task_identity('piqa')\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
