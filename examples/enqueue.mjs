// Hand leads in over HTTP, with Node 18 or newer and no package.
const url = process.env.PIPELINE_URL ?? "http://127.0.0.1:8000";
const campaign = "68ecc86fd9fbecbe9431a18e";
const leads = [
  { phone: "99997 89877", data: { customer_name: "Asha", place: "Pune" } },
  { phone: "+91 98111 22334", data: { customer_name: "Ravi", place: "Jaipur" } },
  { phone: "not given", data: { customer_name: "Meera", place: "Kochi" } },
];

const answer = await fetch(`${url}/v1/campaigns/${campaign}/leads`, {
  method: "POST",
  headers: { authorization: `Bearer ${process.env.INTAKE_TOKEN}`, "content-type": "application/json" },
  body: JSON.stringify(leads),
});
if (answer.status !== 202) {
  // 503 says that the broker is away: send the same leads again later. 4xx says what is wrong with the request.
  console.error(answer.status, await answer.text());
  process.exit(1);
}
for (const { index, id, error } of (await answer.json()).results) {
  console.log(id ?? `row ${index + 1} is refused: ${error}`);
}
