from finetune.cli.logs import of_index


def pod(name, job, index=None):
    labels = {"job-name": job} | ({"batch.kubernetes.io/job-completion-index": str(index)} if index is not None else {})
    return {"metadata": {"name": name, "labels": labels}}


def test_the_first_pod_of_the_newest_attempt_speaks_for_all():
    pods = [pod("a", "train-1", 0), pod("b", "train-1", 1), pod("c", "train-2", 0), pod("d", "train-2", 1)]
    assert of_index(pods, 0)["metadata"]["name"] == "c"
    assert of_index(pods, 1)["metadata"]["name"] == "d"
    assert of_index(pods, 2) is None


def test_after_a_pause_the_newer_pod_of_an_index_is_shown():
    pods = [pod("a", "train-1", 0), pod("b", "train-1", 1), pod("c", "train-1", 1), pod("d", "train-1", 0)]
    assert of_index(pods, 1)["metadata"]["name"] == "c"


def test_a_step_of_a_single_pod_has_no_index():
    assert of_index([pod("a", "prepare-1")], 0)["metadata"]["name"] == "a"
