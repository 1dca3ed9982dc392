// Holds custom resources against their schemas. Reads a JSON list of {from, resource}, prints a line for each fault.
const models = {
  "gateway.networking.k8s.io/v1": () => import("@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1"),
  "keda.sh/v1alpha1": () => import("@kubernetes-models/keda/keda.sh/v1alpha1"),
  "monitoring.coreos.com/v1": () => import("@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1"),
};

let text = "";
for await (const piece of process.stdin) text += piece;
for (const { from, resource } of JSON.parse(text)) {
  const name = `${from}: ${resource.kind} ${resource.metadata?.name}`;
  const known = await models[resource.apiVersion]?.();
  const Model = known?.[resource.kind];
  if (!Model) {
    console.log(`${name}: no schema for ${resource.apiVersion}`);
    continue;
  }
  try {
    new Model(resource).validate();
  } catch (error) {
    console.log(`${name}: ${error.message}`);
  }
}
