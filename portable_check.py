"""Right and how fast: the portable kernels in several tiles. JSON after every step to $OUT."""
import dataclasses, functools, itertools, json, os, statistics, sys, time, traceback
start=time.time()
LIMIT=float(os.environ.get("LIMIT","140"))
import jax, jax.numpy as jnp, numpy as np
import pallas_kernels as pk
from benchmarks import kernel_cases as kc, kernel_rivals
from pallas_kernels import calls, support, shapes
from pallas_kernels.portable import ops
from pallas_kernels.portable.tuning import TileConfig
out_path=os.path.join(os.environ.get("OUT","/tmp"),"portable.json")
rows=[]
def put(**kw):
    kw["at"]=round(time.time()-start,1)
    rows.append(kw); print(json.dumps(kw),flush=True)
    json.dump(rows,open(out_path,"w"),indent=1)
def left(): return LIMIT-(time.time()-start)
put(step="env",jax=jax.__version__,device=str(jax.devices()),kind=jax.devices()[0].device_kind)
DEV=support.device_of()
ROWS=2
def timeit(fn,args,batches=3,calls_=5):
    out=jax.block_until_ready(fn(*args)); jax.block_until_ready(fn(*args))
    ts=[]
    for _ in range(batches):
        t=time.perf_counter()
        for _ in range(calls_): out=fn(*args)
        jax.block_until_ready(out); ts.append((time.perf_counter()-t)/calls_*1e3)
    return statistics.median(ts),out
truths={}
def error(case,out):
    if case.name not in truths: truths[case.name]=kc.sampled_truth(case,ROWS)
    worst=0.
    for place,want in truths[case.name]:
        got=np.asarray(out[place],np.float32)
        worst=max(worst,float(np.linalg.norm(got-want)/np.linalg.norm(want)))
    return worst
CASES={c.name:c for c in kc.all_cases()}
def run(name,config,bound=100.0,**kw):
    case=CASES[name]; q,k,v=kc.operands(case.shape,ROWS); keys=case.shape.keys
    base=dict(device=DEV,logit_bound=bound)
    extra=()
    if case.kind=="dense":
        f=lambda q,k,v: ops.attend(calls.Attention(q=q,k=k,v=v,kv_length=keys,**base),config)
    elif case.kind in("csla-blocks","blocks-64"):
        t=kc.blocks(case)
        f=lambda q,k,v: ops.attend_blocks(calls.BlockSparseAttention(q=q,k=k,v=v,blocks=t,**base),t,config)
    elif case.kind=="csla-boxes":
        g,w,s=kc.geometry(case.scale)
        f=lambda q,k,v: ops.attend_windows(calls.WindowAttention(q=q,k=k,v=v,geometry=g,windows=w,sinks=s,exact=kw.get("exact",False),**base),config)
    else:
        gran=int(case.kind.rsplit("-",1)[1]); lists=jnp.asarray(kc.columns(case,ROWS)); extra=(lists,)
        f=lambda q,k,v,l: ops.attend_columns(calls.ColumnSparseAttention(q=q,k=k,v=v,columns=l,counts=jnp.full(l.shape[:3],l.shape[3],jnp.int32),kv_length=keys,group=192,granularity=gran,**base),config)
    g=jax.jit(lambda *a: f(*a).swapaxes(1,2))
    t0=time.time()
    try:
        ms,out=timeit(g,(q,k,v,*extra))
        e=None if kw.get("exact") else error(case,out.swapaxes(1,2))
        put(case=name,config=dataclasses.asdict(config),bound=bound,ms=round(ms,4),error=e,took=round(time.time()-t0,1),**kw)
    except Exception as ex:
        put(case=name,config=dataclasses.asdict(config),bound=bound,failed=f"{type(ex).__name__}: {str(ex)[:300]}",**kw)
def T(bq,bk,w,s): return TileConfig(block_q=bq,block_k=bk,warps=w,stages=s)
def rivals():
    case=CASES["8b/scale12/dense"]
    for name in ("fa2",):
        try:
            c=kernel_rivals.TORCH[name](case,ROWS)
            if c is None: put(rival=name,failed="not here"); continue
            m,sp,_=kernel_rivals.time_torch(c,5,5); put(rival=name,ms=round(m,4))
        except Exception as ex: put(rival=name,failed=str(ex)[:300])
    try:
        f,args=kernel_rivals.cudnn(case,ROWS); m,_=timeit(jax.jit(f),args); put(rival="cudnn",ms=round(m,4))
    except Exception as ex: put(rival="cudnn",failed=str(ex)[:300])
    if support.device_of().capability==(9,0):
        q,k,v=kc.operands(case.shape,ROWS)
        m,_=timeit(jax.jit(lambda q,k,v: pk.attention(q,k,v,case.shape.keys,logit_bound=100.,implementation="hopper").swapaxes(1,2)),(q,k,v)); put(rival="hopper",ms=round(m,4))
def decision():
    case=CASES["8b/scale10/decision"]; q,k,v=kc.operands(case.shape,ROWS); keys=case.shape.keys
    for bq,bk,w,s in ((64,128,4,3),(64,64,4,3),(64,128,8,3),(64,128,4,2),(64,256,8,2)):
        if left()<8: return
        c=T(bq,bk,w,s)
        dense=T(128,64,8,3)
        d=lambda q,k,v: ops.attend(calls.Attention(device=DEV,q=q,k=k,v=v,kv_length=keys,return_lse=True,logit_bound=100.),dense)
        try:
            md,(o,lse)=timeit(jax.jit(d),(q,k,v))
            f=jax.jit(lambda q,k,lse: ops.column_sums(calls.AttentionColumnSums(device=DEV,q=q,k=k,v=k,lse=lse,kv_length=keys,group=192),c))
            ms,sums=timeit(f,(q,k,lse))
            if bq==64 and bk==128 and w==4 and s==3:
                want=jax.jit(lambda q,k,v:pk.attention_column_sums(q,k,v,keys,192,implementation="xla")[1])(q[:1,:2],k[:1,:2],v[:1,:2])
                e=float(jnp.abs(sums[:1,:2]-want).max()/want.max())
                sel=jax.jit(lambda s: ops.select_columns(calls.SelectColumns(device=DEV,sums=s,count=784,granularity=1)))
                msel,got=timeit(sel,(sums,))
                same=bool((got==pk.select_columns(sums,784,implementation="xla")).all())
                put(step="select",ms=round(msel,4),same=same,sums_error=e)
            put(step="column_sums",config=[bq,bk,w,s],ms=round(ms,4),dense_ms=round(md,4))
        except Exception as ex: put(step="column_sums",config=[bq,bk,w,s],failed=f"{type(ex).__name__}: {str(ex)[:300]}")
P="8b/scale12/"
PLAN=[
 ("rivals",),
 (P+"dense",T(128,64,8,3)),(P+"dense",T(128,128,8,2)),(P+"dense",T(64,64,4,3)),(P+"dense",T(128,64,8,2)),(P+"dense",T(64,128,4,2)),
 (P+"csla-blocks",T(128,64,8,3)),(P+"csla-blocks",T(128,128,8,2)),(P+"csla-blocks",T(64,64,4,3)),(P+"csla-blocks",T(64,128,4,2)),
 (P+"csla-boxes",T(128,64,8,3)),(P+"csla-boxes",T(128,64,8,4)),(P+"csla-boxes",T(64,64,4,3)),(P+"csla-boxes",T(128,32,4,4)),(P+"csla-boxes",T(128,128,8,2)),
 (P+"columns-8",T(64,64,4,3)),(P+"columns-8",T(256,64,8,2)),(P+"columns-8",T(64,64,4,4)),(P+"columns-8",T(64,32,4,4)),(P+"columns-8",T(256,32,8,3)),(P+"columns-8",T(256,64,16,3)),
 ("decision",),
 (P+"columns-1",T(64,64,4,3)),(P+"columns-1",T(256,64,8,2)),
 (P+"dense",T(128,64,8,3),None),(P+"dense",T(128,128,8,2),None),
 (P+"dense",T(128,64,4,3)),(P+"dense",T(128,64,8,4)),(P+"dense",T(128,32,8,4)),
 ("exact",),
]
only=sys.argv[1:]
for item in PLAN:
    if only and not any(o in item[0] for o in only): continue
    if left()<8: put(step="out of time"); break
    try:
        if item[0]=="rivals": rivals()
        elif item[0]=="decision": decision()
        elif item[0]=="exact": run(P+"csla-boxes",T(128,64,8,3),exact=True)
        else: run(*item)
    except Exception as ex: put(step=str(item[0]),failed=traceback.format_exc()[-600:])
put(step="done")
