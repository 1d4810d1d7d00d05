"""The Helm chart, without a cluster: what each file of values/ renders to is valid for Kubernetes and fits together, what
is in refused/ is refused, and the program accepts the configuration. scripts/test-helm runs this.

Untested here: what the objects do in a cluster.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/prefetchd"
PLAIN = ROOT / "deploy/kubernetes/prefetchd.yaml"
RULES = ROOT / "deploy/rules.yml"
COPY_OF_RULES = CHART / "files/rules.yml"
HELMS = [Path(helm).resolve() for helm in os.environ["HELMS"].split(":")]
# kubeVersion of the chart, and the newest whose schemas are there.
KUBERNETES = ["1.30", kubernetes_validate.latest_version()]
# Those of the Prometheus operator have no schema here.
WITHOUT_SCHEMA = {"ServiceMonitor", "PrometheusRule"}
HEADER = """\
# One prefetchd on Kubernetes: `kubectl apply -n NAMESPACE -f prefetchd.yaml`, after you have put your own image, servers and
# tables in. docs/operating.md has the rest. This is the Helm chart with its default values, written by
# `scripts/test-helm --write`; change the chart rather than this file.
"""


def helm(program, *args):
    # Without the settings and repositories of whoever runs this.
    with tempfile.TemporaryDirectory() as home:
        env = {"HOME": home, "PATH": os.environ["PATH"]}
        return subprocess.run([program, *map(str, args)], env=env, capture_output=True, text=True)


def succeeded(done):
    if done.returncode != 0:
        raise AssertionError(done.stdout + done.stderr)
    return done.stdout


def template(*args):
    """What every Helm renders, which must be the same."""
    texts = {succeeded(helm(program, "template", *args)) for program in HELMS}
    assert len(texts) == 1, f"{HELMS} render different texts"
    return texts.pop()


def plain():
    return HEADER + template("prefetchd", CHART, "--skip-tests")


def load(file):
    return yaml.safe_load(file.read_text())


class Rendered:
    def __init__(self, name, values, release="prefetchd"):
        self.name = name
        args = ["-f", values] if values else []
        self.text = template(release, CHART, "--namespace", "shop", *args)
        self.objects = [o for o in yaml.safe_load_all(self.text) if o]
        merged = load(CHART / "values.yaml")
        self.values = merge(merged, load(values)) if values else merged

    def of(self, kind):
        return [o for o in self.objects if o["kind"] == kind]

    def one(self, kind):
        (found,) = self.of(kind)
        return found

    @property
    def pod(self):
        return self.one("Deployment")["spec"]["template"]

    @property
    def container(self):
        (container,) = self.pod["spec"]["containers"]
        return container

    @property
    def env(self):
        return {e["name"]: e.get("value") for e in self.container["env"]}

    def mounted(self, path):
        """The volume that contains this path, and the rest of the path."""
        mounts = [m for m in self.container["volumeMounts"] if path.startswith(m["mountPath"] + "/")]
        (mount,) = mounts
        (volume,) = [v for v in self.pod["spec"]["volumes"] if v["name"] == mount["name"]]
        return volume, path.removeprefix(mount["mountPath"] + "/")


def merge(base, over):
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {key: merge(base.get(key), value) for key, value in over.items()}


VALUES = [None, *sorted((ROOT / "tests/helm/values").iterdir())]
ALL = [Rendered(values.stem if values else "default", values) for values in VALUES]


def of_each(test):
    """Calls a test with what each file of values renders to."""

    def all_of_them(self):
        for rendered in ALL:
            with self.subTest(rendered.name):
                test(self, rendered)

    return all_of_them


class Chart(unittest.TestCase):
    maxDiff = None

    def test_is_what_helm_wants(self):
        for program in HELMS:
            for values in VALUES:
                with self.subTest(program=program.name, values=values):
                    succeeded(helm(program, "lint", "--strict", CHART, *(["-f", values] if values else [])))

    @of_each
    def test_fits_the_schemas_of_kubernetes(self, r):
        for found in r.objects:
            if found["kind"] not in WITHOUT_SCHEMA:
                for version in KUBERNETES:
                    kubernetes_validate.validate(found, version, strict=True)

    def test_refuses_an_older_kubernetes(self):
        for program in HELMS:
            succeeded(helm(program, "template", "prefetchd", CHART, "--kube-version", KUBERNETES[0]))
            self.assertNotEqual(helm(program, "template", "prefetchd", CHART, "--kube-version", "1.29").returncode, 0)

    def test_refuses_wrong_values(self):
        files = sorted((ROOT / "tests/helm/refused").iterdir())
        self.assertGreater(len(files), 5)
        for program in HELMS:
            for file in files:
                with self.subTest(program=program.name, file=file.name):
                    done = helm(program, "template", "prefetchd", CHART, "-f", file)
                    self.assertNotEqual(done.returncode, 0, done.stdout)
                    expected = file.read_text().splitlines()[0].removeprefix("# ")
                    self.assertIn(expected, done.stderr)
                    self.assertNotIn("hunter2", done.stdout + done.stderr)

    def test_the_schema_of_the_values_knows_each_of_them_and_no_other(self):
        schema = load(CHART / "values.schema.json")
        jsonschema.Draft7Validator.check_schema(schema)

        def compare(schema, values, path):
            if "properties" not in schema or not isinstance(values, dict):
                return
            self.assertIs(schema["additionalProperties"], False, path)
            # A chart that has this one as a part may give it `global`.
            self.assertEqual(set(schema["properties"]) - {"global"}, set(values), path)
            for key, value in values.items():
                compare(schema["properties"][key], value, f"{path}.{key}")

        compare(schema, load(CHART / "values.yaml"), "values")

    def test_the_plain_manifests_are_the_chart_with_its_default_values(self):
        self.assertEqual(PLAIN.read_text(), plain(), "run scripts/test-helm --write")

    def test_says_what_to_do_next(self):
        for values in VALUES:
            args = ["install", "prefetchd", CHART, "--namespace", "shop", "--dry-run=client"]
            # Helm 3 wants a cluster for this.
            text = succeeded(helm(HELMS[-1], *args, *(["-f", values] if values else [])))
            notes = text.split("NOTES:\n")[1]
            least = values is not None and values.stem == "least"
            self.assertIn("-- prefetchd status", notes)
            self.assertEqual("WARNING" in notes, least, notes)
            self.assertEqual("prefetchd reload" in notes, least, notes)
            self.assertEqual("kubectl -n shop create secret" in notes, not least, notes)

    # ------------------------------------------------------------------------------------------ the program

    @of_each
    def test_the_program_accepts_the_configuration(self, r):
        text = r.one("ConfigMap")["data"]["prefetchd.toml"]
        self.assertEqual(text, r.values["config"])
        volume, file = r.mounted("/etc/prefetchd/prefetchd.toml")
        self.assertEqual(volume["configMap"]["name"], r.one("ConfigMap")["metadata"]["name"])
        self.assertEqual(file, "prefetchd.toml")
        with tempfile.TemporaryDirectory() as dir:
            # It also reads the files. The mounts are directories here.
            paths = {m["mountPath"]: Path(dir) / m["name"] for m in r.container["volumeMounts"]}

            def here(text):
                for mount, path in paths.items():
                    text = text.replace(f"{mount}/", f"{path}/")
                return text

            for path in paths.values():
                path.mkdir()
            for name in ("postgres-password", "redis-password", "admin-token"):
                (paths.get("/etc/prefetchd-secrets", Path(dir)) / name).write_text("0123456789abcdef")
            certificate = (ROOT / "tests/fixtures/version_1.pem").read_text()
            (paths.get("/etc/prefetchd-tls", Path(dir)) / "ca.crt").write_text(certificate)
            toml = Path(dir) / "prefetchd.toml"
            toml.write_text(here(text))
            env = {name: here(value) for name, value in r.env.items() if name != "PGPASSFILE"}
            command = [os.environ["PREFETCHD"], "config", "-c", toml]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            effective = succeeded(done)
            self.assertIn(f'listen = "{r.values["listenAddress"]}:8787"', effective)
            for section, secret in (("postgres", "postgresPassword"), ("redis", "redisPassword")):
                found = re.search(rf'^\[{section}\](?:.|\n)*?^password_file = "(.*)"', effective, re.M)[1]
                self.assertEqual(bool(found), bool(r.values["secrets"][secret]["name"]), effective)
            self.assertNotIn("0123456789abcdef", effective)

    def test_what_the_image_needs(self):
        docker = (ROOT / "Dockerfile").read_text()
        directory = re.search(r"^ENV RUNTIME_DIRECTORY=(\S+)$", docker, re.M)[1]
        for r in ALL:
            self.assertEqual(r.container["args"], json.loads(re.search(r"^CMD (\[\"run.*)$", docker, re.M)[1]))
            # It makes the directory itself: it refuses one that belongs to root, as the top of a volume does.
            volume, below = r.mounted(directory)
            self.assertEqual((volume["emptyDir"]["medium"], below), ("Memory", "prefetchd"))
            self.assertIn(f"EXPOSE {r.container['ports'][0]['containerPort']}\n", docker)
        cargo = re.search(r'^\[package\](?:.|\n)*?^version = "(.*)"$', (ROOT / "Cargo.toml").read_text(), re.M)[1]
        chart = load(CHART / "Chart.yaml")
        self.assertEqual((chart["appVersion"], chart["version"]), (cargo, cargo))
        self.assertEqual(ALL[0].container["image"], f"prefetchd:{cargo}")

    # ------------------------------------------------------------------------------------------ secrets and rights

    @of_each
    def test_secrets_are_referred_to_and_never_contained(self, r):
        self.assertEqual(r.of("Secret"), [])
        names = {
            "PREFETCHD__POSTGRES__PASSWORD_FILE": "postgresPassword",
            "PREFETCHD__REDIS__PASSWORD_FILE": "redisPassword",
            "PREFETCHD__HTTP__ADMIN_TOKEN_FILE": "adminToken",
        }
        for setting, secret in names.items():
            secret = r.values["secrets"][secret]
            self.assertEqual(setting in r.env, bool(secret["name"]), setting)
            if not secret["name"]:
                continue
            volume, file = r.mounted(r.env[setting])
            # Readable for the group alone: `check` warns otherwise.
            self.assertEqual(volume["projected"]["defaultMode"], 0o440)
            sources = [s["secret"] for s in volume["projected"]["sources"]]
            self.assertEqual(len({s["items"][0]["path"] for s in sources}), len(sources))
            item = {"key": secret["key"], "path": file}
            self.assertIn({"name": secret["name"], "items": [item]}, sources)

    @of_each
    def test_pods_may_do_nothing_that_they_need_not(self, r):
        for spec in [r.pod["spec"], *(pod["spec"] for pod in r.of("Pod"))]:
            self.assertIs(spec["automountServiceAccountToken"], False)
            for key in ("hostNetwork", "hostPID", "hostIPC"):
                self.assertNotIn(key, spec)
            context = spec["securityContext"]
            self.assertIs(context["runAsNonRoot"], True)
            self.assertEqual({context[key] for key in ("runAsUser", "runAsGroup", "fsGroup")}, {65532})
            self.assertEqual(context["seccompProfile"], {"type": "RuntimeDefault"})
            (container,) = spec["containers"]
            own = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
            self.assertEqual(container["securityContext"], own)
            self.assertIn("memory", container["resources"]["limits"])
        for mount in r.container["volumeMounts"]:
            self.assertTrue(mount.get("readOnly") or mount["name"] == "run", mount)
            # A file that is mounted by itself does not change with its Secret or ConfigMap.
            self.assertNotIn("subPath", mount)

    @of_each
    def test_who_reaches_the_port(self, r):
        self.assertEqual(len(r.of("NetworkPolicy")), int(r.values["networkPolicy"]["enabled"]))
        for policy in r.of("NetworkPolicy"):
            (ingress,) = policy["spec"]["ingress"]
            # An empty list would let everybody in.
            self.assertTrue(ingress["from"])
            self.assertEqual(ingress["from"], r.values["networkPolicy"]["ingressFrom"])
            self.assertEqual(ingress["ports"], [{"port": r.container["ports"][0]["containerPort"]}])
            egress = r.values["networkPolicy"]["egress"]
            self.assertEqual("Egress" in policy["spec"]["policyTypes"], egress["enabled"])
            self.assertEqual("egress" in policy["spec"], egress["enabled"])
            if egress["enabled"]:
                dns, servers = policy["spec"]["egress"]
                self.assertEqual({p["protocol"] for p in dns["ports"] if p["port"] == 53}, {"UDP", "TCP"})
                self.assertEqual([p["port"] for p in servers["ports"]], egress["ports"])
                self.assertEqual(servers["to"], egress["to"])

    def test_an_empty_list_of_readers_lets_nobody_in(self):
        text = template("prefetchd", CHART, "--set-json", "networkPolicy.ingressFrom=[]")
        (policy,) = [o for o in yaml.safe_load_all(text) if o["kind"] == "NetworkPolicy"]
        self.assertEqual((policy["spec"]["ingress"], policy["spec"]["policyTypes"]), ([], ["Ingress"]))

    # ------------------------------------------------------------------------------------------ updates and readers

    @of_each
    def test_probes(self, r):
        paths = {n: r.container[n]["httpGet"] for n in ("startupProbe", "livenessProbe", "readinessProbe")}
        self.assertEqual({probe["port"] for probe in paths.values()}, {r.container["ports"][0]["name"]})
        # /readyz would end a long first load.
        self.assertEqual({paths["startupProbe"]["path"], paths["livenessProbe"]["path"]}, {"/healthz"})
        self.assertEqual(paths["readinessProbe"]["path"], r.values["readinessPath"])

    @of_each
    def test_an_update_ends(self, r):
        spec = r.one("Deployment")["spec"]
        if r.values["readinessPath"] == "/readyz":
            # A standby with another table is not ready beside the active daemon.
            self.assertEqual(spec["strategy"], {"type": "Recreate"})
        else:
            rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
            self.assertEqual(spec["strategy"], rolling)
            self.assertGreaterEqual(spec["minReadySeconds"], 15)
        # Otherwise there might be no place for the additional pod.
        for spread in r.pod["spec"].get("topologySpreadConstraints", []):
            self.assertEqual(spread["whenUnsatisfiable"], "ScheduleAnyway")
            self.assertEqual(spread["labelSelector"], spec["selector"])
        self.assertEqual("topologySpreadConstraints" in r.pod["spec"], r.values["replicas"] > 1)
        self.assertEqual(spec["replicas"], r.values["replicas"])

    def test_a_change_of_the_configuration_replaces_the_pods_unless_it_is_reloaded(self):
        seen = set()
        for restart in ("true", "false"):
            for table in ("a", "b"):
                values = {"config": f'[[tables]]\nname = "{table}"\n', "restartOnConfigChange": restart == "true"}
                with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                    json.dump(values, file)
                    file.flush()
                    seen.add(json.dumps(Rendered(table, Path(file.name)).pod))
        self.assertEqual(len(seen), 3)

    @of_each
    def test_the_end_of_a_pod_leaves_time_to_drain(self, r):
        sleep = r.container["lifecycle"]["preStop"]["sleep"]["seconds"]
        self.assertGreaterEqual(r.pod["spec"]["terminationGracePeriodSeconds"], sleep + 15)

    @of_each
    def test_one_of_several_daemons_may_be_evicted_at_a_time(self, r):
        wanted = r.values["podDisruptionBudget"]["enabled"] and r.values["replicas"] > 1
        self.assertEqual(len(r.of("PodDisruptionBudget")), int(wanted))
        for budget in r.of("PodDisruptionBudget"):
            self.assertEqual((budget["spec"]["maxUnavailable"]), 1)
            self.assertEqual(budget["spec"]["unhealthyPodEvictionPolicy"], "AlwaysAllow")

    def test_memory_is_what_the_documentation_asks_for(self):
        self.assertIn("Give the daemon 200 MB", (ROOT / "docs/operating.md").read_text())
        limits = ALL[0].container["resources"]["limits"]
        self.assertEqual(limits, {"memory": "256Mi"}, "without a limit on the CPU")

    # ------------------------------------------------------------------------------------------ names and labels

    def test_selectors_select_the_daemons_and_nothing_else(self):
        for r in [*ALL, Rendered("another release", None, release="shop")]:
            labels = r.pod["metadata"]["labels"]
            selector = r.one("Deployment")["spec"]["selector"]["matchLabels"]
            others = [*r.of("PodDisruptionBudget"), *r.of("ServiceMonitor")]
            selectors = [r.one("Service")["spec"]["selector"], *(o["spec"]["selector"]["matchLabels"] for o in others)]
            selectors += [o["spec"]["podSelector"]["matchLabels"] for o in r.of("NetworkPolicy")]
            for found in selectors:
                self.assertEqual(found, selector)
            self.assertEqual(labels | selector, labels)
            # What docs/alerts.md has, too.
            self.assertEqual(labels["app.kubernetes.io/name"], "prefetchd")
            for pod in r.of("Pod"):
                self.assertNotEqual(pod["metadata"]["labels"] | selector, pod["metadata"]["labels"])
                url = pod["spec"]["containers"][0]["args"][2]
                service = r.one("Service")
                self.assertEqual(url, f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}")
            names = [(o["kind"], o["metadata"]["name"]) for o in r.objects]
            self.assertEqual(len(names), len(set(names)))
            self.assertEqual(r.one("Service")["spec"]["ports"][0]["targetPort"], r.container["ports"][0]["name"])

    def test_long_names_fit(self):
        long = "a" * 53
        for found in Rendered("long", None, release=long).objects:
            self.assertLessEqual(len(found["metadata"]["name"]), 63)

    # ------------------------------------------------------------------------------------------ Prometheus

    def test_the_job_and_the_alerts_agree(self):
        self.assertEqual(COPY_OF_RULES.read_text(), RULES.read_text(), "run scripts/test-helm --write")
        (all_on,) = [r for r in ALL if r.of("ServiceMonitor")]
        (endpoint,) = all_on.one("ServiceMonitor")["spec"]["endpoints"]
        self.assertEqual(endpoint["port"], all_on.one("Service")["spec"]["ports"][0]["name"])
        (job,) = endpoint["relabelings"]
        self.assertEqual((job["targetLabel"], job["replacement"]), ("job", "prefetchd/shop/cache"))
        patterns = set(re.findall(r'job=~"([^"]*)"', RULES.read_text()))
        self.assertTrue(patterns and all(re.fullmatch(pattern, job["replacement"]) for pattern in patterns))
        rules = RULES.read_text().replace("file:///usr/share/doc/prefetchd/docs", "https://wiki.example.com/prefetchd")
        self.assertEqual(all_on.one("PrometheusRule")["spec"], yaml.safe_load(rules))
        for kind in WITHOUT_SCHEMA:
            self.assertEqual(all_on.one(kind)["metadata"]["labels"]["release"], "prometheus")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        COPY_OF_RULES.write_text(RULES.read_text())
        PLAIN.write_text(plain())
    else:
        unittest.main()
